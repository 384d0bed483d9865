//! A whole TAPA.

use super::world::{LIMIT, World};
use super::*;
use meridio_proto::{
    ambassador::v1::stream_status::Status as Shown,
    nsp::v1::{Target, target::Status},
};
use std::{sync::atomic::Ordering::SeqCst, time::Instant};

#[tokio::test]
async fn open_close_and_end() {
    let world = World::new().await;
    let tapa = world.start();
    let begin = Instant::now();
    let key = tapa.open("s");
    tapa.reaches(&key, Shown::Open).await;
    assert!(begin.elapsed() < Duration::from_millis(500), "{:?}", begin.elapsed());
    let target = world.enabled().remove(0);
    assert_eq!(target.ips, ["172.16.1.6/24"]);
    let context = world.mesh.context().unwrap();
    assert_eq!(context.src_ip_addrs, ["172.16.1.6/24", "20.0.0.1/32"]);
    assert_eq!(context.policies[0].routes[0].next_hop, "172.16.1.1");

    world.nsp.vips.send_replace(vec!["20.0.0.1/32".into(), "2000::1/128".into()]);
    let wait = async {
        while world.mesh.context().unwrap().policies.len() != 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.unwrap();

    tapa.board.close(&key);
    world.targets("not unregistered", <[Target]>::is_empty).await;
    let key = tapa.open("s");
    tapa.reaches(&key, Shown::Open).await;
    tapa.end().await;
    assert!(world.nsp.targets.borrow().is_empty());
    assert!(world.mesh.context().is_none(), "the connection is closed");
}

#[tokio::test]
async fn a_killed_tapa_goes_on_where_it_was() {
    let world = World::new().await;
    let tapa = world.start();
    let key = tapa.open("s");
    tapa.reaches(&key, Shown::Open).await;
    let (before, context) = (world.enabled(), world.mesh.context());
    tapa.kill().await;
    assert_eq!((world.enabled(), world.mesh.context()), (before.clone(), context.clone()), "nothing is taken back");
    world.mesh.0.requests.lock().unwrap().clear();

    let renewed = world.registrations(1);
    let tapa = world.start();
    assert_eq!(renewed.await, before, "renewed at once");
    tapa.reaches(&key, Shown::Open).await;
    assert_eq!((world.enabled(), world.mesh.context()), (before, context));
    for request in world.mesh.0.requests.lock().unwrap().iter() {
        let sent = request.connection.clone().unwrap().context.unwrap().ip_context.unwrap();
        assert!(sent.src_ip_addrs.contains(&"20.0.0.1/32".to_owned()), "VIPs stay on the interface");
    }
    tapa.end().await;
}

#[tokio::test]
async fn a_full_stream_and_an_unknown_one() {
    let world = World::new().await;
    let other = |n: u32| Target {
        ips: vec![format!("172.16.9.{n}/24")],
        context: [("identifier".to_owned(), n.to_string())].into(),
        ..Target::default()
    };
    world.nsp.targets.send_replace(vec![other(1), other(2), other(3)]);
    let tapa = world.start();
    let (full, unknown) = (tapa.open("s"), tapa.open("unknown"));
    tapa.reaches(&unknown, Shown::Undefined).await;
    tapa.reaches(&full, Shown::Unavailable).await;
    assert_eq!(world.enabled().len(), 3);
    world.nsp.targets.send_modify(|targets| drop(targets.remove(1)));
    tapa.reaches(&full, Shown::Open).await;
    let own = world.enabled().into_iter().find(|target| target.ips[0].starts_with("172.16.1.")).unwrap();
    assert_eq!(own.context["identifier"], "2");
    tapa.end().await;
}

#[tokio::test]
async fn new_addresses_are_registered_with_the_same_identifier_and_an_expired_entry_again() {
    let world = World::new().await;
    let tapa = world.start();
    let key = tapa.open("s");
    tapa.reaches(&key, Shown::Open).await;
    let identifier = world.enabled().remove(0).context["identifier"].clone();
    world.mesh.renumber(2);
    let is = |targets: &[Target], ip: &str| {
        targets.len() == 1 && targets[0].ips == [ip] && targets[0].status() == Status::Enabled
    };
    let moved = world.targets("not moved", |targets| is(targets, "172.16.2.6/24")).await;
    assert_eq!(moved[0].context["identifier"], identifier);
    world.nsp.targets.send_modify(Vec::clear);
    let again = world.targets("not registered again", |targets| is(targets, "172.16.2.6/24")).await;
    assert_eq!(again[0].context["identifier"], identifier);
    tapa.end().await;
}

#[tokio::test]
async fn traffic_is_asked_for_only_when_the_vips_are_there() {
    let world = World::new().await;
    let tapa = world.start();
    // Connected, but the forwarder refuses to set addresses.
    world.mesh.0.fail.store(true, SeqCst);
    let key = tapa.open("s");
    world.targets("not registered", |targets| !targets.is_empty()).await;
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert!(world.enabled().is_empty());
    tapa.reaches(&key, Shown::Pending).await;
    world.mesh.0.fail.store(false, SeqCst);
    tapa.reaches(&key, Shown::Open).await;
    tapa.end().await;
}

#[tokio::test]
async fn without_the_manager_a_restarted_tapa_renews_what_works() {
    let mut world = World::new().await;
    world.settings.nsp_entry_timeout = Duration::from_millis(50).into();
    world.settings.grpc_max_backoff = Duration::from_millis(200).into();
    let tapa = world.start();
    let key = tapa.open("s");
    tapa.reaches(&key, Shown::Open).await;
    let before = world.enabled();
    tapa.kill().await;

    world.mesh.0.away.store(true, SeqCst);
    let tapa = world.start();
    let renewed = world.registrations(5).await;
    assert!(renewed.iter().all(|target| *target == before[0]), "{renewed:?}");
    tapa.reaches(&key, Shown::Unavailable).await;
    // What does not work is left to expire.
    world.mesh.0.dead.store(true, SeqCst);
    let quiet = async {
        let mut before = usize::MAX;
        while before != world.nsp.registered.borrow().len() {
            before = world.nsp.registered.borrow().len();
            world.mesh.asked(2).await;
        }
    };
    tokio::time::timeout(LIMIT, quiet).await.expect("it is renewed");
    world.mesh.0.dead.store(false, SeqCst);
    world.registrations(1).await;

    world.mesh.0.away.store(false, SeqCst);
    tapa.reaches(&key, Shown::Open).await;
    assert_eq!(world.enabled(), before);
    tapa.end().await;
}

#[tokio::test]
async fn a_target_is_disabled_while_its_wire_is_dead() {
    let world = World::new().await;
    let tapa = world.start();
    let key = tapa.open("s");
    tapa.reaches(&key, Shown::Open).await;
    let (before, asked) = (world.enabled(), world.nsp.registered.borrow().len());
    // Control is lost, the wire works.
    world.mesh.lose();
    world.mesh.asked(3).await;
    assert_eq!((world.enabled(), world.nsp.registered.borrow().len()), (before.clone(), asked));
    assert_eq!(tapa.board.subscribe().borrow().get(&key), Some(&Shown::Open));

    world.mesh.0.dead.store(true, SeqCst);
    world.mesh.reselect();
    tapa.reaches(&key, Shown::Unavailable).await;
    let disabled = world.targets("not disabled", |targets| targets[0].status() == Status::Disabled).await;
    assert_eq!((disabled.len(), &disabled[0].context, &disabled[0].ips), (1, &before[0].context, &before[0].ips));
    world.mesh.asked(2).await;
    assert_eq!(tapa.board.subscribe().borrow().get(&key), Some(&Shown::Unavailable));

    world.mesh.heal();
    tapa.reaches(&key, Shown::Open).await;
    assert_eq!(world.enabled(), before);
    tapa.end().await;
}
