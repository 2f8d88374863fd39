#![allow(clippy::unwrap_used)]

use super::*;

const OWN: u32 = 100;

fn peer(uid: u32, gid: u32) -> Option<PeerIds> {
    Some(PeerIds { uid, gid })
}

#[test]
fn without_rules_the_files_mode_decides_and_only_masters_have_power() {
    let socket = SocketSetup::at("/s");
    assert_eq!(socket.mode, 0o660);
    for (who, power) in [(peer(0, 0), true), (peer(OWN, 7), true), (peer(1000, 1000), false), (None, false)] {
        assert_eq!(socket.access(who, OWN), Ok(Rule { power, ..Rule::default() }), "{who:?}");
    }
    assert!(!socket.access(peer(OWN, OWN), 0).unwrap().power, "a user that serve gave up to be");
}

#[test]
fn the_first_rule_that_fits_decides_and_nobody_else_may_ask() {
    let one = Rule { uid: Some(1000), class: Class::Interactive, power: true, ..Rule::default() };
    let both = Rule { uid: Some(1001), gid: Some(50), ctx: Some(64), ..Rule::default() };
    let group = Rule { gid: Some(50), tokens_per_minute: Some(60), ..Rule::default() };
    let socket = SocketSetup { allow: Some(vec![one, both, group]), ..SocketSetup::at("/s") };
    assert_eq!(socket.access(peer(1000, 50), OWN), Ok(one));
    assert_eq!(socket.access(peer(1001, 50), OWN), Ok(both));
    assert_eq!(socket.access(peer(1002, 50), OWN), Ok(group));
    for (uid, gid) in [(1001, 51), (1002, 51), (50, 1000)] {
        let denied = Denied::NoRule(PeerIds { uid, gid });
        assert_eq!(socket.access(peer(uid, gid), OWN), Err(denied));
        let reject = denied.to_reject();
        assert_eq!((reject.status, reject.kind), (403, "permission_error"));
        assert!(reject.message.contains(&format!("user {uid} or group {gid}")), "{}", reject.message);
    }
    for who in [None, peer(OVERFLOW_ID, OVERFLOW_ID)] {
        assert_eq!(socket.access(who, OWN), Err(Denied::Unknown));
    }
    assert_eq!(Denied::Unknown.to_reject().status, 401);
    for master in [0, OWN] {
        assert!(socket.access(peer(master, 9), OWN).unwrap().power);
    }
}

#[test]
fn an_empty_list_is_for_the_masters_alone_and_a_rule_without_a_name_for_all() {
    let nobody = SocketSetup { allow: Some(vec![]), ..SocketSetup::at("/s") };
    assert!(nobody.access(peer(1, 1), OWN).is_err() && nobody.access(peer(0, 0), OWN).is_ok());
    let all = Rule { max_sequences: Some(1), ..Rule::default() };
    let socket = SocketSetup { allow: Some(vec![all]), ..SocketSetup::at("/s") };
    assert_eq!(socket.access(peer(1, 1), OWN), Ok(all));
    assert_eq!(socket.access(peer(OWN, 1), OWN), Ok(Rule { power: true, ..all }));
}

#[test]
fn tokens_come_back_evenly_and_what_was_taken_beyond_is_waited_for() {
    let (mut meters, begin) = (Meters::default(), Instant::now());
    let after = |seconds: u64| begin + Duration::from_secs(seconds);
    let seconds = |wait: Result<(), Duration>| wait.unwrap_err().as_secs_f64().round();
    assert_eq!(meters.ask(7, 60, 50, begin), Ok(()));
    meters.charge(7, 50);
    assert_eq!(seconds(meters.ask(7, 60, 20, begin)), 10.0);
    assert_eq!(meters.ask(7, 60, 20, after(10)), Ok(()));
    // A long answer goes on to its end.
    meters.charge(7, 20 + 100);
    assert_eq!(seconds(meters.ask(7, 60, 1, after(10))), 101.0);
    assert_eq!(seconds(meters.ask(7, 60, 1, after(100))), 11.0);
    assert_eq!(meters.ask(7, 60, 1, after(111)), Ok(()));
    // Another user has tokens of their own, and a prompt of more than a minute's needs a whole minute's.
    assert_eq!(meters.ask(8, 60, 1000, begin), Ok(()));
    meters.charge(8, 1000);
    assert_eq!(seconds(meters.ask(8, 60, 1000, begin)), 1000.0);
    assert_eq!(seconds(meters.ask(8, 120, 1, begin)), 471.0, "more a minute come back sooner");
}

#[test]
fn asking_often_does_not_lose_what_comes_back() {
    let (mut meters, begin) = (Meters::default(), Instant::now());
    meters.ask(1, 1, 1, begin).unwrap();
    meters.charge(1, 1);
    let turn = (1..=7000).find(|&turn| meters.ask(1, 1, 1, begin + Duration::from_millis(10) * turn).is_ok());
    assert!((5999..=6001).contains(&turn.unwrap()), "{turn:?}");
}

#[test]
fn the_table_of_users_is_bounded_and_forgets_those_who_have_all_of_theirs() {
    let (mut meters, begin) = (Meters::default(), Instant::now());
    for uid in 0..MAX_METERED_USERS as u32 {
        meters.ask(uid, 60, 1, begin).unwrap();
        meters.charge(uid, 30);
    }
    assert!(meters.ask(9999, 60, 1, begin).is_err());
    assert_eq!(meters.ask(9999, 60, 1, begin + Duration::from_secs(31)), Ok(()));
    assert_eq!(meters.users.len(), 1);
    assert!(meters.users.capacity() * (size_of::<u32>() + size_of::<Meter>()) <= METERS_BYTES);
}
