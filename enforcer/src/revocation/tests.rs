use enforcer_common::abi::text;

use super::*;

const AT: u64 = 1_000;

/// A revocation of alice's token `[7; 16]` at `corp`, as far as `selectors` ask for it, said at [`AT`].
pub(crate) fn revocation(selectors: u32) -> Revocation {
    let name = |selector, name: &str| if selectors & selector != 0 { name_hash(name) } else { [0; 16] };
    Revocation {
        revoked_at_unix_secs: AT,
        issued_until_unix_secs: AT,
        expires_at_unix_secs: AT + 100,
        fingerprint: if selectors & REVOKE_TOKEN != 0 { [7; 16] } else { [0; 16] },
        issuer_hash: name(REVOKE_ISSUER, "https://login.example.com"),
        subject_hash: name(REVOKE_SUBJECT, "alice"),
        client_hash: name(REVOKE_CLIENT, "editor"),
        server_hash: name(REVOKE_SERVER, "files"),
        workload_hash: name(REVOKE_WORKLOAD, "agent.service"),
        selectors,
        exact_end: 0,
        issuer: if selectors & REVOKE_ISSUER != 0 { text("https://login.example.com") } else { [0; 96] },
        subject: if selectors & REVOKE_SUBJECT != 0 { text("alice") } else { [0; 128] },
        client_id: if selectors & REVOKE_CLIENT != 0 { text("editor") } else { [0; 80] },
        server: if selectors & REVOKE_SERVER != 0 { text("files") } else { [0; 64] },
        workload: if selectors & REVOKE_WORKLOAD != 0 { text("agent.service") } else { [0; 128] },
    }
}

fn alice() -> Subject {
    Subject {
        fingerprint: Fingerprint([7; 16]),
        issued_at_unix_secs: Some(AT),
        issuer_name: name_hash("corp"),
        issuer: name_hash("https://login.example.com"),
        subject: name_hash("alice"),
        client: name_hash("editor"),
        server: name_hash("files"),
        workload: ["x", "agent.service"].map(name_hash),
    }
}

const EVERY: u32 =
    REVOKE_TOKEN | REVOKE_ISSUER | REVOKE_SUBJECT | REVOKE_CLIENT | REVOKE_SERVER | REVOKE_WORKLOAD;

/// Subjects that differ from [`alice`] in one thing, and the selector that asks for it.
fn others() -> Vec<(u32, Subject)> {
    let other = name_hash("other");
    vec![
        (REVOKE_TOKEN, Subject { fingerprint: Fingerprint([8; 16]), ..alice() }),
        (REVOKE_ISSUER, Subject { issuer: other, ..alice() }),
        (REVOKE_SUBJECT, Subject { subject: other, ..alice() }),
        (REVOKE_CLIENT, Subject { client: other, ..alice() }),
        (REVOKE_CLIENT, Subject { client: NameHash::default(), ..alice() }),
        (REVOKE_SERVER, Subject { server: other, ..alice() }),
        (REVOKE_WORKLOAD, Subject { workload: [other; 2], ..alice() }),
    ]
}

#[test]
fn a_revocation_means_what_matches_all_that_it_asks_for() {
    for selectors in 0..=EVERY {
        let revocation = revocation(selectors);
        let list = RevocationList::new(&[(1, revocation)].into());
        assert!(matches(&revocation, &alice()), "{selectors:b}");
        assert_eq!(list.find(&alice(), AT).map(|(id, _)| id), Some(1), "{selectors:b}");
        for (selector, subject) in others() {
            let meant = selectors & selector == 0;
            assert_eq!(matches(&revocation, &subject), meant, "{selectors:b} {selector:b}");
            assert_eq!(list.find(&subject, AT).is_some(), meant, "{selectors:b} {selector:b}");
        }
    }
}

#[test]
fn an_issuer_is_known_by_its_name_in_the_policy_too() {
    let by_name = Revocation { issuer_hash: name_hash("corp"), ..revocation(REVOKE_ISSUER) };
    assert!(matches(&by_name, &alice()));
    assert!(RevocationList::new(&[(1, by_name)].into()).find(&alice(), AT).is_some());
}

#[test]
fn names_that_begin_alike_are_told_apart() {
    let long = "x".repeat(1000);
    let meant = Subject { subject: name_hash(&format!("{long}1")), ..alice() };
    let other = Subject { subject: name_hash(&format!("{long}2")), ..alice() };
    let revocation = Revocation { subject_hash: meant.subject, ..revocation(REVOKE_SUBJECT) };
    assert!(matches(&revocation, &meant) && !matches(&revocation, &other));
}

#[test]
fn tokens_issued_later_are_not_meant_and_those_without_a_date_are() {
    let later = Subject { issued_at_unix_secs: Some(AT + 1), ..alice() };
    let undated = Subject { issued_at_unix_secs: None, ..alice() };
    for selectors in 0..=EVERY {
        // A token's fingerprint is that of one token, whenever it was issued.
        assert_eq!(matches(&revocation(selectors), &later), selectors & REVOKE_TOKEN != 0, "{selectors:b}");
        assert!(selects(&revocation(selectors), &later));
        assert!(matches(&revocation(selectors), &undated));
    }
}

#[test]
fn a_revocation_ends() {
    let list = RevocationList::new(&[(1, revocation(REVOKE_SUBJECT))].into());
    assert!(list.find(&alice(), AT + 99).is_some());
    assert!(list.find(&alice(), AT + 100).is_none());
    assert!(!is_over(&revocation(0), AT + 99) && is_over(&revocation(0), AT + 100));
}

#[test]
fn who_hides_its_name_is_meant_by_what_means_any_workload() {
    let hidden = Subject { workload: UNNAMED, ..alice() };
    for selectors in [REVOKE_WORKLOAD, REVOKE_WORKLOAD | REVOKE_SUBJECT] {
        let revocation = revocation(selectors);
        let list = RevocationList::new(&[(1, revocation)].into());
        assert!(matches(&revocation, &hidden) && list.find(&hidden, AT).is_some());
        let other = Subject { subject: name_hash("bob"), ..hidden };
        assert_eq!(list.find(&other, AT).is_some(), selectors & REVOKE_SUBJECT == 0);
    }
}
