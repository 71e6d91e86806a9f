// How Node's HTTP server (llhttp) reads streams of bytes. In: for each stream its length (32 bits, little endian) and its bytes. Out: a
// line of JSON for each stream: the requests that the server saw, and whether it refused the rest.
'use strict';
const http = require('http');
const { Duplex } = require('stream');

const BODY_MAX_BYTES = 20000;
let done = null;
let seen = [];

const server = http.createServer({ keepAlive: true }, (request, response) => {
  const named = (name) => {
    const values = [];
    for (let k = 0; k < request.rawHeaders.length; k += 2) {
      if (request.rawHeaders[k].toLowerCase() === name) values.push(request.rawHeaders[k + 1]);
    }
    return values;
  };
  const record = {
    method: request.method,
    target: request.url,
    authorization: named('authorization'),
    content_length: named('content-length'),
    transfer_encoding: named('transfer-encoding'),
    body: 0,
  };
  seen.push(record);
  request.on('error', () => {});
  request.on('data', (data) => { record.body += data.length; });
  request.on('end', () => {
    response.end();
    if (request.url === '/marker') done(false);
  });
  // Longer bodies are not sent.
  if (Number(record.content_length[0]) > BODY_MAX_BYTES) done(false);
});
server.timeout = server.requestTimeout = server.headersTimeout = server.keepAliveTimeout = 0;
// What came before the error is delivered first.
server.on('clientError', () => {
  const refused = done;
  setImmediate(() => setImmediate(() => refused(true)));
});
// What asks for another protocol is not served, as by a server that does not speak it.
server.on('connect', () => done(true));

function read(bytes) {
  return new Promise((resolve) => {
    seen = [];
    const socket = new Duplex({ read() {}, write(_chunk, _encoding, next) { next(); } });
    socket.setTimeout = () => socket;
    socket.setNoDelay = socket.setKeepAlive = () => socket;
    socket.on('error', () => {});
    const limit = setTimeout(() => done(false), 1000);
    let over = false;
    done = (refused) => {
      if (over) return;
      over = true;
      clearTimeout(limit);
      socket.destroy();
      resolve({ requests: seen, refused });
    };
    server.emit('connection', socket);
    socket.push(bytes);
  });
}

async function main() {
  let held = Buffer.alloc(0);
  for await (const chunk of process.stdin) {
    held = Buffer.concat([held, chunk]);
    while (held.length >= 4 && held.length >= 4 + held.readUInt32LE(0)) {
      const end = 4 + held.readUInt32LE(0);
      const answer = await read(Buffer.from(held.subarray(4, end)));
      held = held.subarray(end);
      process.stdout.write(JSON.stringify(answer) + '\n');
    }
  }
}

main();
