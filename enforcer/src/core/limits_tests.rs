use std::sync::Arc;

use super::*;
use crate::core::tests::Fake;
use crate::http::test_server::server;
use crate::policy::Rate;
use crate::token::testing::World;

const NOW: Now = Now { boot_ns: 1_000_000_000_000, unix_secs: 0, unix_subsec_ns: 0 };

fn limit(name: &str, per: Dimension) -> Arc<Limit> {
    let rate = Some(Rate { interval_ns: 1_000_000_000, burst: 2 });
    Arc::new(Limit { name: name.to_owned(), per, rate, streams: None, ipv4_prefix: 24, ipv6_prefix: 64 })
}

fn at(address: &str) -> CallerView<'static> {
    CallerView { workload: None, uid: u32::MAX, address: address.parse().unwrap(), is_of_this_host: false }
}

struct Bench {
    table: BucketTable,
    fake: Fake,
    server: Server,
    token: VerifiedToken,
}

impl Bench {
    fn new(limits: Vec<Arc<Limit>>) -> Self {
        let server = Server { limits, ..server("/mcp") };
        let token = World::new().verify().unwrap();
        Self { table: BucketTable::new(7), fake: Fake::default(), server, token }
    }

    fn assign(&mut self, caller: &CallerView<'_>, now: Now) -> Option<GrantBuckets> {
        let payer = Payer::of_token(&self.server, &self.token, caller);
        self.table.assign(&payer, now, &mut self.fake)
    }
}

#[test]
fn equal_values_share_a_bucket_and_others_do_not() {
    let dimensions = [
        Dimension::Server,
        Dimension::Source,
        Dimension::Workload,
        Dimension::Uid,
        Dimension::Principal,
        Dimension::Client,
    ];
    let mut bench = Bench::new(dimensions.iter().map(|per| limit(per.name(), *per)).collect());
    let first = bench.assign(&at("10.0.0.1"), NOW).unwrap();
    assert_eq!(first, [1, 2, 3, 4, 5, 6, 0, 0]);
    assert_eq!(bench.assign(&at("10.0.0.1"), NOW), Some(first));
    // Another address in the same network: another workload and user, as far as anybody knows.
    let near = bench.assign(&at("10.0.0.2"), NOW).unwrap();
    assert_eq!(near, [1, 2, 7, 8, 5, 6, 0, 0]);
    assert_eq!(bench.assign(&at("10.0.1.1"), NOW).unwrap(), [1, 9, 10, 11, 5, 6, 0, 0]);
    let values: Vec<_> =
        bench.fake.buckets.values().map(|(_, label)| text_str(&label.value).to_owned()).collect();
    assert_eq!(
        values[..6],
        ["tools", "10.0.0.0/24", "10.0.0.1", "unknown, 10.0.0.1", "main/alice (agent-1)", "main/agent-1"]
            .map(str::to_owned),
    );
    bench.token.subject = "bob".to_owned();
    assert_eq!(bench.assign(&at("10.0.0.1"), NOW).unwrap(), [1, 2, 3, 4, 12, 6, 0, 0]);
    bench.token.client_id = None;
    assert_eq!(bench.assign(&at("10.0.0.1"), NOW).unwrap(), [1, 2, 3, 4, 13, 14, 0, 0]);
}

#[test]
fn a_changed_limit_changes_its_buckets_and_keeps_what_was_charged() {
    let mut bench = Bench::new(vec![limit("all", Dimension::Server)]);
    let buckets = bench.assign(&at("10.0.0.1"), NOW).unwrap();
    let charge = |bench: &mut Bench| bench.fake.charge(0, &buckets, NOW.boot_ns);
    assert_eq!((charge(&mut bench), charge(&mut bench)), (Ok(()), Ok(())));
    assert_eq!(charge(&mut bench), Err(1_000_000_000));
    let rate = Some(Rate { interval_ns: 500_000_000, burst: 5 });
    bench.server.limits = vec![Arc::new(Limit { rate, ..(*limit("all", Dimension::Server)).clone() })];
    assert_eq!(bench.assign(&at("10.0.0.1"), NOW), Some(buckets));
    assert_eq!(charge(&mut bench), Err(500_000_000), "deeper, and as empty as before");
}

#[test]
fn idle_buckets_are_freed_and_rest_before_they_are_used_again() {
    let mut bench = Bench::new(vec![limit("all", Dimension::Source)]);
    let [first, second, third] =
        ["10.0.0.1", "10.0.1.1", "10.0.2.1"].map(|address| bench.assign(&at(address), NOW).unwrap()[0]);
    bench.fake.buckets.get_mut(&second).unwrap().0.open = 1;
    bench.fake.buckets.get_mut(&third).unwrap().0.tat_ns = NOW.boot_ns + 1;
    bench.table.free(&HashSet::from([first]), NOW, &mut bench.fake);
    assert_eq!(bench.table.len(), 3, "named, held, not full");
    bench.table.free(&HashSet::new(), NOW, &mut bench.fake);
    assert_eq!(bench.table.len(), 2);
    assert_eq!(bench.assign(&at("10.0.3.1"), NOW).unwrap()[0], 4, "the freed one rests");
    let later = Now { boot_ns: NOW.boot_ns + QUARANTINE_NS, ..NOW };
    assert_eq!(bench.assign(&at("10.0.4.1"), later).unwrap()[0], first);
}

#[test]
fn a_full_table_gives_nothing() {
    let mut bench = Bench::new(vec![limit("all", Dimension::Source)]);
    bench.table.next = MAX_BUCKETS - 1;
    assert!(bench.assign(&at("10.0.0.1"), NOW).is_some());
    assert_eq!(bench.assign(&at("10.0.1.1"), NOW), None);
    assert!(bench.assign(&at("10.0.0.1"), NOW).is_some());
}

#[test]
fn places_that_no_connection_has_are_given_back_at_the_second_look() {
    let mut bench = Bench::new(vec![limit("all", Dimension::Server)]);
    let index = bench.assign(&at("10.0.0.1"), NOW).unwrap()[0];
    let open = |bench: &Bench| bench.fake.buckets[&index].0.open;
    bench.fake.buckets.get_mut(&index).unwrap().0.open = 3;
    let look = |bench: &mut Bench, taken| {
        let before = bench.table.places(&mut bench.fake);
        bench.table.settle_places(&before, &HashMap::from([(index, taken)]), &mut bench.fake);
        open(bench)
    };
    assert_eq!(look(&mut bench, 1), 3);
    // Somebody comes or goes from one look to the next: nothing is known for sure.
    assert_eq!(look(&mut bench, 2), 3);
    assert_eq!(look(&mut bench, 2), 2);
    assert_eq!(look(&mut bench, 2), 2);
    // Or during one: that does not count as a look.
    assert_eq!(look(&mut bench, 1), 2);
    let before = HashMap::from([(index, 1)]);
    bench.table.settle_places(&before, &HashMap::from([(index, 1)]), &mut bench.fake);
    assert_eq!(open(&bench), 2);
    assert_eq!(look(&mut bench, 1), 2);
    assert_eq!(look(&mut bench, 1), 1);
}

#[test]
fn the_next_daemon_goes_on_with_the_same_buckets() {
    let mut bench = Bench::new(vec![limit("all", Dimension::Source)]);
    let indices =
        ["10.0.0.1", "10.0.1.1", "10.0.2.1"].map(|address| bench.assign(&at(address), NOW).unwrap()[0]);
    bench.fake.buckets.remove(&indices[1]);
    let free = Bucket {
        tat_ns: 0,
        interval_ns: 0,
        burst_ns: 0,
        open: 0,
        max_open: 0,
        admitted: 0,
        limited: 0,
        serial: 0,
    };
    let mut table = BucketTable::new(1);
    let all: Vec<_> =
        (0..9).map(|index| (index, bench.fake.buckets.get(&index).map_or(free, |(b, _)| *b))).collect();
    table.adopt(all, |index| bench.fake.buckets.get(&index).map(|(_, label)| *label), NOW);
    bench.table = table;
    assert_eq!(bench.assign(&at("10.0.0.1"), NOW).unwrap()[0], indices[0]);
    assert_eq!(bench.assign(&at("10.0.2.1"), NOW).unwrap()[0], indices[2]);
    // The freed one rests, and no serial comes again.
    let fresh = bench.assign(&at("10.0.1.1"), NOW).unwrap()[0];
    assert_eq!(fresh, indices[2] + 1);
    let serials: HashSet<_> = bench.fake.buckets.values().map(|(bucket, _)| bucket.serial).collect();
    assert_eq!(serials.len(), 3);
}
