use super::*;
use proptest::prelude::*;

fn connection(id: &str, index: u32, segments: &[(&str, &str)]) -> Connection {
    let path_segments = segments
        .iter()
        .map(|(name, id)| PathSegment { name: (*name).into(), id: (*id).into(), ..Default::default() })
        .collect();
    Connection { id: id.into(), path: Some(Path { index, path_segments }), ..Default::default() }
}

fn ids(connection: &Connection) -> Vec<(&str, &str)> {
    let path = connection.path.as_ref().unwrap();
    path.path_segments.iter().map(|segment| (&*segment.name, &*segment.id)).collect()
}

// Conformance 18
#[test]
fn without_a_path_a_segment_is_made() {
    let mut conn = Connection { id: "conn-1".into(), ..Default::default() };
    assert_eq!(advance(&mut conn, "nsc"), Ok(0));
    assert_eq!((ids(&conn), conn.id.as_str()), (vec![("nsc", "conn-1")], "conn-1"));

    let mut conn = Connection::default();
    assert_eq!(advance(&mut conn, "nsc"), Ok(0));
    assert_eq!(conn.id.len(), 36);
    assert_eq!(ids(&conn), [("nsc", conn.id.as_str())]);
}

// Conformance 18
#[test]
fn the_own_segment_is_found_again() {
    let mut conn = connection("other", 0, &[("nsc", "conn-1"), ("mgr", "conn-2")]);
    assert_eq!(advance(&mut conn, "nsc"), Ok(0));
    assert_eq!((index(&conn), conn.id.as_str()), (0, "conn-1"));
}

// Conformance 18
#[test]
fn the_next_segment_is_appended_renamed_or_taken() {
    let mut conn = connection("conn-1", 0, &[("nsc", "conn-1")]);
    assert_eq!(advance(&mut conn, "mgr"), Ok(0));
    assert_eq!((index(&conn), ids(&conn)[1]), (1, ("mgr", conn.id.as_str())));

    let mut conn = connection("conn-1", 0, &[("nsc", "conn-1"), ("old", "conn-2"), ("nse", "conn-3")]);
    assert_eq!(advance(&mut conn, "mgr"), Ok(0));
    assert_ne!(conn.id, "conn-2");
    assert_eq!((ids(&conn)[1], ids(&conn)[2]), (("mgr", conn.id.as_str()), ("nse", "conn-3")));

    let mut conn = connection("conn-1", 0, &[("nsc", "conn-1"), ("mgr", "conn-2"), ("nse", "conn-3")]);
    assert_eq!(advance(&mut conn, "mgr"), Ok(0));
    assert_eq!((index(&conn), conn.id.as_str()), (1, "conn-2"));
    restore(&mut conn, 0, "conn-1").unwrap();
    assert_eq!((index(&conn), conn.id.as_str()), (0, "conn-1"));
}

// Conformance 18
#[test]
fn inconsistent_paths_are_refused() {
    let mut conn = connection("conn-1", 2, &[("nsc", "conn-1")]);
    assert_eq!(advance(&mut conn, "mgr"), Err(PathError::Index { next: 3, len: 1 }));
    let mut conn = connection("conn-1", u32::MAX, &[("nsc", "conn-1")]);
    assert!(matches!(advance(&mut conn, "mgr"), Err(PathError::Index { .. })));
    let mut conn = connection("foreign", 0, &[("nsc", "conn-1")]);
    assert!(matches!(advance(&mut conn, "mgr"), Err(PathError::Id { .. })));
}

#[test]
fn an_answer_has_the_segment_it_was_asked_with() {
    let without = Connection { id: "conn-1".into(), ..Default::default() };
    let [shorter, foreign] = [&[("nsc", "conn-1")][..], &[("nsc", "conn-1"), ("mgr", "other")]];
    for (mut answer, found) in [
        (without, None),
        (connection("conn-2", 1, shorter), None),
        (connection("conn-2", 1, foreign), Some("other".to_owned())),
    ] {
        let error = PathError::Answer { index: 1, asked: "conn-2".into(), found };
        assert_eq!(restore(&mut answer, 1, "conn-2"), Err(error));
    }
}

fn any_connection() -> impl Strategy<Value = Connection> {
    let segments = proptest::collection::vec(("[a-c]", "[a-c0-9]{0,3}"), 0..5);
    (segments, 0_u32..7, "[a-c0-9]{0,3}", any::<bool>()).prop_map(|(segments, index, id, agree)| {
        let mut conn = connection(&id, index, &[]);
        let path = conn.path.as_mut().unwrap();
        path.path_segments =
            segments.into_iter().map(|(name, id)| PathSegment { name, id, ..Default::default() }).collect();
        if let Some(own) = path.path_segments.get(index as usize).filter(|_| agree) {
            conn.id = own.id.clone();
        }
        conn
    })
}

proptest! {
    /// Whatever comes off the wire: the view afterwards is consistent, nobody else's segment is lost, and the
    /// second pass changes nothing.
    #[test]
    fn advance_is_consistent(sent in any_connection(), name in "[a-d]") {
        let mut own = sent.clone();
        let Ok(back) = advance(&mut own, &name) else { return Ok(()) };
        let segment = segment(&own, 0).unwrap().clone();
        prop_assert_eq!(&segment.name, &name);
        prop_assert_eq!(&segment.id, &own.id);
        let (before, after) = (sent.path.unwrap().path_segments, own.path.clone().unwrap().path_segments);
        for (i, old) in before.iter().enumerate().filter(|(i, _)| *i != index(&own)) {
            prop_assert_eq!(old, &after[i]);
        }
        let mut again = own.clone();
        prop_assert_eq!(advance(&mut again, &name), Ok(index(&own)));
        prop_assert_eq!(&again, &own);
        let sender = own.path.as_ref().unwrap().path_segments[back].id.clone();
        prop_assert_eq!(restore(&mut own, back, &sender), Ok(()));
        prop_assert_eq!((index(&own), &own.id), (back, &sender));
    }
}
