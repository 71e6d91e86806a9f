use std::io::{ErrorKind, Read};
use std::net::{TcpListener, TcpStream};

use super::*;
use crate::lifecycle::testing::{TestCgroup, TestEnforcement, is_root};

const AT_ONCE: UnloadOptions = UnloadOptions { drain_timeout: Duration::ZERO, force: false };

fn connect(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let (server, _) = listener.accept().unwrap();
    (client, server)
}

fn is_reset(client: &mut TcpStream) -> bool {
    matches!(client.read(&mut [0; 1]), Err(error) if error.kind() == ErrorKind::ConnectionReset)
}

#[test]
fn nothing_loaded_is_fine() {
    let report = unload(&PinDir::new("/no/such/place/enforcer"), &AT_ONCE).unwrap();
    assert!(!report.was_loaded);
    assert_eq!(report.flows_at_start, 0);
}

#[test]
fn open_flows_are_destroyed_and_everything_is_removed() {
    if !is_root("open_flows_are_destroyed_and_everything_is_removed") {
        return;
    }
    let cgroup = TestCgroup::enter("unload-a");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let enforcement = TestEnforcement::start("unload-a", &cgroup, listener.local_addr().unwrap().port());
    let (mut one, _server_one) = connect(&listener);
    let (mut two, _server_two) = connect(&listener);
    assert_eq!(enforcement.maps.live.flows.iter().count(), 2);

    let report = unload(&enforcement.pins, &AT_ONCE).unwrap();
    assert_eq!(report.flows_at_start, 2, "{report:?}");
    assert_eq!(report.flows_destroyed, 2, "{report:?}");
    assert_eq!((report.flows_drained, report.records_stale, report.flows_abandoned), (0, 0, 0));
    assert_eq!(report.errors, Vec::<String>::new());
    assert!(is_reset(&mut one) && is_reset(&mut two));
    assert!(!enforcement.pins.path().exists());

    // Detached: a new connection is not recorded.
    let _ = connect(&listener);
    assert_eq!(enforcement.maps.live.flows.iter().count(), 0);
    assert!(!unload(&enforcement.pins, &AT_ONCE).unwrap().was_loaded);
}

#[test]
fn flows_that_end_in_time_are_not_cut_and_new_ones_are_not_tagged() {
    if !is_root("flows_that_end_in_time_are_not_cut_and_new_ones_are_not_tagged") {
        return;
    }
    let cgroup = TestCgroup::enter("unload-b");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let enforcement = TestEnforcement::start("unload-b", &cgroup, listener.local_addr().unwrap().port());
    let (mut client, server) = connect(&listener);
    let pins = enforcement.pins.clone();
    let unloading = std::thread::spawn(move || {
        unload(&pins, &UnloadOptions { drain_timeout: Duration::from_secs(20), force: false })
    });
    let deadline = Instant::now() + Duration::from_secs(5);
    while enforcement.maps.live.configuration().unwrap().draining == 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    let _free = connect(&listener);
    assert_eq!(enforcement.maps.live.flows.iter().count(), 1);
    assert!(enforcement.pins.pin(LINK_PIN).exists());
    drop(server);
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    drop(client);
    let report = unloading.join().unwrap().unwrap();
    assert_eq!((report.flows_at_start, report.flows_drained, report.flows_destroyed), (1, 1, 0));
    assert!(!enforcement.pins.path().exists());
}

#[test]
fn records_without_a_socket_are_deleted() {
    if !is_root("records_without_a_socket_are_deleted") {
        return;
    }
    let cgroup = TestCgroup::enter("unload-c");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let enforcement = TestEnforcement::start("unload-c", &cgroup, listener.local_addr().unwrap().port());
    let (client, server) = connect(&listener);
    // Somebody detaches the program; now nothing notices the end of the connection.
    std::fs::remove_file(enforcement.pins.pin(LINK_PIN)).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    drop((client, server));
    assert_eq!(enforcement.maps.live.flows.iter().count(), 1);
    let report = unload(&enforcement.pins, &AT_ONCE).unwrap();
    assert_eq!((report.flows_at_start, report.records_stale, report.flows_destroyed), (1, 1, 0));
    assert!(!enforcement.pins.path().exists());
}

#[test]
fn a_half_made_directory_is_removed() {
    if !is_root("a_half_made_directory_is_removed") {
        return;
    }
    let pins = crate::lifecycle::paths::pin_dir(
        std::path::Path::new(crate::lifecycle::paths::BPFFS),
        &format!("enforcer-half-{}", std::process::id()),
    );
    std::fs::create_dir(pins.path()).unwrap();
    assert!(unload(&pins, &AT_ONCE).unwrap().was_loaded);
    assert!(!pins.path().exists());
}
