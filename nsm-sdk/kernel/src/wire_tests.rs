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

/// The names of the connection `id` of the client "nsc".
fn names(id: &str) -> Names {
    Names::new(id, "nsc", "nsc")
}

fn ends() -> (End, End) {
    let (a, b) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    (
        End { netns: a, name: "nsm-0".into(), alias: names("id").client() },
        End { netns: b, name: "conduit-a".into(), alias: names("id").endpoint() },
    )
}

#[test]
fn right_pair_is_adopted_and_wrong_one_replaced() {
    let (a, b) = ends();
    let la = link(5, "nsm-0", "server-id/nsc", Some(7));
    let lb = link(7, "conduit-a", "client-id/nsc", Some(5));
    let plan = plan_veth(&a, &b, std::slice::from_ref(&la), std::slice::from_ref(&lb)).unwrap();
    assert_eq!(plan.adopt, Some((5, Some(7))));
    // Interrupted before the aliases were set.
    let plan = plan_veth(&a, &b, &[link(5, "nsm-0", "", Some(7))], &[link(7, "conduit-a", "", Some(5))]).unwrap();
    assert_eq!(plan.adopt, Some((5, Some(7))));
    // Leads elsewhere: replaced. Another name: adopted, to be renamed.
    let plan = plan_veth(&a, &b, std::slice::from_ref(&la), &[]).unwrap();
    assert_eq!(plan, WirePlan { delete_first: vec![5], ..Default::default() });
    let renamed = link(5, "nsm-9", "server-id/nsc", Some(7));
    let plan = plan_veth(&a, &b, std::slice::from_ref(&renamed), std::slice::from_ref(&lb)).unwrap();
    assert_eq!(plan.adopt, Some((5, Some(7))));
    // ... unless the wanted name is somebody else's.
    let taken = link(6, "nsm-0", "server-other/nsx", Some(8));
    assert!(matches!(plan_veth(&a, &b, &[renamed, taken], &[lb]), Err(Error::Foreign { .. })));
}

/// What clients call their connections decides nothing in the endpoint's namespace.
#[test]
fn only_the_own_interfaces_are_touched_whatever_clients_call_themselves() {
    let (a, b) = ends();
    let other = link(9, "conduit-b", "client-other/nsc", Some(5));
    let new = |end: &End, alias| End { alias, ..end.clone() };
    let heirs = [new(&a, names("id").anew(true).client()), new(&b, names("id").anew(true).endpoint())];
    for [a, b] in [&[a, b], &heirs] {
        assert_eq!(plan_veth(a, b, &[], std::slice::from_ref(&other)).unwrap(), WirePlan::default());
    }
}

/// A client that asks anew, in the same namespace and under the same id, goes on with what it had: also with what former versions
/// have made. What is not joined any more is in the way, but only in its own namespace.
#[test]
fn what_a_client_has_left_is_inherited_once() {
    let (a, b) = ends();
    let new = |end: &End, alias| End { alias, ..end.clone() };
    let heirs = (new(&a, names("id").anew(true).client()), new(&b, names("id").anew(true).endpoint()));
    for (client, endpoint) in [("server-x/nsc", "client-x/nsc"), ("server-nsc", "client-nsc")] {
        let (la, lb) = (link(5, "nsm-0", client, Some(7)), link(7, "conduit-a", endpoint, Some(5)));
        let (la, lb) = (std::slice::from_ref(&la), std::slice::from_ref(&lb));
        assert_eq!(plan_veth(&heirs.0, &heirs.1, la, &[]).unwrap().delete_first, [5]);
        assert_eq!(plan_veth(&heirs.0, &heirs.1, la, lb).unwrap().adopt, Some((5, Some(7))));
        // One that has its interfaces already takes none.
        assert!(matches!(plan_veth(&a, &b, la, lb), Err(Error::Foreign { .. })));
        // Not its own: the endpoint's end leads to somebody else.
        let elsewhere = [link(7, "conduit-a", endpoint, Some(6))];
        assert!(matches!(plan_veth(&heirs.0, &heirs.1, la, &elsewhere), Err(Error::Foreign { .. })));
        let mixed = [link(7, "conduit-a", "client-y/nsc", Some(5))];
        assert!(matches!(plan_veth(&heirs.0, &heirs.1, la, &mixed), Err(Error::Foreign { .. })));
        // Its own comes first.
        let both = |own: Link, left: &[Link]| [left, &[own]].concat();
        let (own_a, own_b) = (link(8, "own", "server-id/nsc", Some(9)), link(9, "own", "client-id/nsc", Some(8)));
        let free = (new(&heirs.0, heirs.0.alias.clone()), End { name: "own".into(), ..heirs.1.clone() });
        let plan =
            plan_veth(&End { name: "own".into(), ..free.0 }, &free.1, &both(own_a, la), &both(own_b, lb)).unwrap();
        assert_eq!(plan.adopt, Some((8, Some(9))));
    }
    // Ids that an alias cannot hold, or that would read like another one, are written as their hashes.
    let odd = Names::new("a/b", &"long".repeat(100), "").client().text;
    assert!(odd.len() < 256 && odd.matches('/').count() == 1, "{odd}");
    assert_ne!(Names::new("a/b", "c", ""), Names::new("a", "b/c", ""));
}

#[test]
fn foreign_interface_is_an_error() {
    let (a, b) = ends();
    let error = plan_veth(&a, &b, &[link(5, "nsm-0", "server-other/nsx", Some(7))], &[]).unwrap_err();
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
    assert_eq!(link.alias, "server-id/nsc");
    assert_eq!(link.mac, Some(mac_from_seed("server-id/nsc")));
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
    assert!(remove_by_alias(&elsewhere.netns, &elsewhere.alias.text).await.unwrap());
    assert!(client.netns.netlink().await.unwrap().link_by_name("nsm-0").await.unwrap().is_none());
}

/// What is certain to be absent is not looked for; everything else is, whoever has made it.
#[tokio::test]
async fn a_namespace_is_listed_once_and_nothing_of_ours_is_overlooked() {
    // The number of a namespace that has ended is given again: perhaps that of another test, which has looked.
    let mut others = Vec::new();
    let (client, endpoint) = loop {
        let ends = ends();
        if !aliases::absent(ends.0.netns.id(), "server-id/nsc") && !aliases::absent(ends.1.netns.id(), "client-id/nsc")
        {
            break ends;
        }
        others.push(ends);
        assert!(others.len() < 1000, "somebody has looked at new namespaces");
    };
    let (ids, wire) =
        ([client.netns.id(), endpoint.netns.id()], Wire::Veth { client: client.clone(), endpoint: endpoint.clone() });
    let second = Wire::Veth {
        client: End { name: "nsm-1".into(), alias: names("other").client(), ..client.clone() },
        endpoint: End { name: "conduit-b".into(), alias: names("other").endpoint(), ..endpoint.clone() },
    };
    ensure(&second).await.unwrap();
    assert!(aliases::absent(ids[0], "server-id/nsc") && aliases::absent(ids[1], "client-id/nsc"));
    let made = ensure(&wire).await.unwrap();
    assert!(made.created && !aliases::absent(ids[0], "server-id/nsc") && !aliases::absent(ids[1], "client-id/nsc"));
    // Its names are taken by nobody, but it has others now: still the same pair.
    client.netns.netlink().await.unwrap().link_rename(made.first, "moved").await.unwrap();
    assert_eq!(ensure(&wire).await.unwrap(), Made { created: false, ..made });
    // An interface under the wanted name that is not ours is an error although our alias is absent.
    let taken = End { name: "nsm-0".into(), alias: names("third").client(), ..client.clone() };
    let third = Wire::Veth { client: taken, endpoint: End { alias: names("third").endpoint(), ..endpoint.clone() } };
    assert!(matches!(ensure(&third).await, Err(Error::Foreign { .. })));
    assert!(remove_by_alias(&client.netns, "server-id/nsc").await.unwrap());
    assert!(
        aliases::absent(ids[0], "server-id/nsc") && !remove_by_alias(&client.netns, "server-id/nsc").await.unwrap()
    );
    // The other end has gone with it, unseen: it may be there as far as anybody knows, and is made anew.
    assert!(!aliases::absent(ids[1], "client-id/nsc"));
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
