use super::*;

fn link(index: u32, name: &str, alias: &str, peer: Option<u32>) -> Link {
    Link {
        index,
        name: name.into(),
        alias: alias.into(),
        kind: VETH.into(),
        mac: None,
        mtu: 1500,
        up: true,
        running: true,
        master: None,
        peer,
        peer_nsid: Some(1),
        vxlan: None,
    }
}

fn ends() -> (End, End) {
    let (a, b) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    (
        End { netns: a, name: "nsm-0".into(), alias: client_alias("id") },
        End { netns: b, name: "conduit-a".into(), alias: endpoint_alias("id") },
    )
}

#[test]
fn right_pair_is_adopted_and_wrong_one_replaced() {
    let (a, b) = ends();
    let la = link(5, "nsm-0", "server-id", Some(7));
    let lb = link(7, "conduit-a", "client-id", Some(5));
    let plan = plan_veth(&a, &b, std::slice::from_ref(&la), std::slice::from_ref(&lb)).unwrap();
    assert_eq!(plan.adopt, Some((5, Some(7))));
    // Interrupted before the aliases were set.
    let plan = plan_veth(&a, &b, &[link(5, "nsm-0", "", Some(7))], &[link(7, "conduit-a", "", Some(5))]).unwrap();
    assert_eq!(plan.adopt, Some((5, Some(7))));
    // Leads elsewhere: replaced. Another name: adopted, to be renamed.
    let plan = plan_veth(&a, &b, std::slice::from_ref(&la), &[]).unwrap();
    assert_eq!(plan, WirePlan { delete_first: vec![5], ..Default::default() });
    let renamed = link(5, "nsm-9", "server-id", Some(7));
    let plan = plan_veth(&a, &b, std::slice::from_ref(&renamed), std::slice::from_ref(&lb)).unwrap();
    assert_eq!(plan.adopt, Some((5, Some(7))));
    // ... unless the wanted name is somebody else's.
    let taken = link(6, "nsm-0", "server-other", Some(8));
    assert!(matches!(plan_veth(&a, &b, &[renamed, taken], &[lb]), Err(Error::Foreign { .. })));
}

#[test]
fn foreign_interface_is_an_error() {
    let (a, b) = ends();
    let error = plan_veth(&a, &b, &[link(5, "nsm-0", "server-other", Some(7))], &[]).unwrap_err();
    assert!(error.to_string().contains("nsm-0"), "{error}");
    assert!(matches!(error, Error::Foreign { .. }));
    let long = End { name: "sixteen-bytes-xx".into(), ..a };
    assert!(check_name(&long).is_err());
}

#[tokio::test]
async fn veth_is_made_once_and_adopted_after() {
    let (client, endpoint) = ends();
    let wire = Wire::Veth { client: client.clone(), endpoint: endpoint.clone() };
    let started = std::time::Instant::now();
    let made = ensure(&wire).await.unwrap();
    println!("veth made in {:?}", started.elapsed());
    assert!(made.created);
    let link = client.netns.netlink().await.unwrap().link_by_name("nsm-0").await.unwrap().unwrap();
    assert_eq!(link.alias, "server-id");
    assert_eq!(link.mac, Some(mac_from_seed("server-id")));
    let again = ensure(&wire).await.unwrap();
    assert_eq!(again, Made { created: false, ..made });
    // Another name on one side: the same interface.
    let renamed = End { name: "conduit-b".into(), ..endpoint.clone() };
    assert_eq!(ensure(&Wire::Veth { client: client.clone(), endpoint: renamed }).await.unwrap(), again);
    let netlink = endpoint.netns.netlink().await.unwrap();
    assert_eq!(
        netlink.link_by_name("conduit-b").await.unwrap().map(|l| (l.index, l.up)),
        made.second.map(|i| (i, true))
    );
    // One end in another namespace now: the pair is made anew.
    let elsewhere = End { netns: Netns::anonymous().unwrap(), ..endpoint };
    let moved = ensure(&Wire::Veth { client: client.clone(), endpoint: elsewhere.clone() }).await.unwrap();
    assert!(moved.created);
    assert!(remove_by_alias(&elsewhere.netns, &elsewhere.alias).await.unwrap());
    assert!(client.netns.netlink().await.unwrap().link_by_name("nsm-0").await.unwrap().is_none());
}

/// What is certain to be absent is not looked for; everything else is, whoever has made it.
#[tokio::test]
async fn a_namespace_is_listed_once_and_nothing_of_ours_is_overlooked() {
    let (client, endpoint) = ends();
    let (ids, wire) =
        ([client.netns.id(), endpoint.netns.id()], Wire::Veth { client: client.clone(), endpoint: endpoint.clone() });
    assert!(!aliases::absent(ids[0], "server-id"), "nobody has looked yet");
    let second = Wire::Veth {
        client: End { name: "nsm-1".into(), alias: client_alias("other"), ..client.clone() },
        endpoint: End { name: "conduit-b".into(), alias: endpoint_alias("other"), ..endpoint.clone() },
    };
    ensure(&second).await.unwrap();
    assert!(aliases::absent(ids[0], "server-id") && aliases::absent(ids[1], "client-id"));
    let made = ensure(&wire).await.unwrap();
    assert!(made.created && !aliases::absent(ids[0], "server-id") && !aliases::absent(ids[1], "client-id"));
    // Its names are taken by nobody, but it has others now: still the same pair.
    client.netns.netlink().await.unwrap().link_rename(made.first, "moved").await.unwrap();
    assert_eq!(ensure(&wire).await.unwrap(), Made { created: false, ..made });
    // An interface under the wanted name that is not ours is an error although our alias is absent.
    let taken = End { name: "nsm-0".into(), alias: client_alias("third"), ..client.clone() };
    let third = Wire::Veth { client: taken, endpoint: End { alias: endpoint_alias("third"), ..endpoint.clone() } };
    assert!(matches!(ensure(&third).await, Err(Error::Foreign { .. })));
    assert!(remove_by_alias(&client.netns, "server-id").await.unwrap());
    assert!(aliases::absent(ids[0], "server-id") && !remove_by_alias(&client.netns, "server-id").await.unwrap());
    // The other end has gone with it, unseen: it may be there as far as anybody knows, and is made anew.
    assert!(!aliases::absent(ids[1], "client-id"));
    assert!(ensure(&wire).await.unwrap().created);
}

#[tokio::test]
async fn end_of_a_namespace_is_noticed_by_its_id() {
    let (client, endpoint) = ends();
    let netlink = client.netns.netlink().await.unwrap();
    let id = netlink.nsid_of(&endpoint.netns).await.unwrap();
    assert_eq!(netlink.nsid_of(&endpoint.netns).await.unwrap(), id);
    assert!(netlink.nsid_alive(id).await.unwrap());
    drop(endpoint);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while netlink.nsid_alive(id).await.unwrap() {
        assert!(std::time::Instant::now() < deadline, "namespace lives on");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}
