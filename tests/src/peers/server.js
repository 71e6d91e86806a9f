'use strict';
const crypto = require('crypto');
const http = require('http');

const [host, port] = process.argv.slice(-2);

function events(response, query) {
  const count = Number(query.get('events') ?? 1);
  const data = 'x'.repeat(Number(query.get('bytes') ?? 10));
  response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  let number = 0;
  // Stops when the socket is full and goes on when it has room again.
  const more = () => {
    while (number < count) {
      const room = response.write(`id: ${number}\ndata: ${data}\n\n`);
      number += 1;
      if (!room) return response.once('drain', more);
    }
    response.end();
  };
  more();
}

const server = http.createServer((request, response) => {
  const hash = crypto.createHash('sha256');
  let length = 0;
  request.on('data', (block) => {
    hash.update(block);
    length += block.length;
  });
  request.on('end', () => {
    const url = new URL(request.url, 'http://unused');
    if (url.pathname === '/sse') return events(response, url.searchParams);
    const body = JSON.stringify({
      method: request.method, path: request.url, len: length, sha256: hash.digest('hex'),
    });
    response.writeHead(200, { 'Content-Type': 'application/json', 'Content-Length': Buffer.byteLength(body) });
    response.end(body);
  });
});
server.listen({ host, port: Number(port), backlog: 512 }, () => {
  console.log(`listening ${host}:${server.address().port}`);
});
