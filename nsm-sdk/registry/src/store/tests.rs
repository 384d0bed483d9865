//! The contract of a store, once for every implementation.

use super::*;

const TABLE: &str = "things";

async fn contract(store: &dyn Store) {
    let put = |key: &'static str, value: &'static str, expect| store.put_if(TABLE, key, value.into(), expect);

    assert_eq!(store.get(TABLE, "a").await.unwrap(), None);
    let first = put("a", "1", Expect::Absent).await.unwrap();
    assert!(
        matches!(put("a", "2", Expect::Absent).await, Err(StoreError::Conflict { actual: Some(r), .. }) if r == first)
    );
    assert!(matches!(put("b", "2", Expect::Revision(first)).await, Err(StoreError::Conflict { actual: None, .. })));
    let second = put("a", "2", Expect::Revision(first)).await.unwrap();
    assert!(second > first);
    assert_eq!(store.get(TABLE, "a").await.unwrap().unwrap().value, b"2");

    put("b", "1", Expect::Any).await.unwrap();
    store.put_if("other", "a", vec![9], Expect::Any).await.unwrap();
    let (records, revision) = store.list(TABLE).await.unwrap();
    assert_eq!(records.iter().map(|r| r.key.as_str()).collect::<Vec<_>>(), ["a", "b"]);

    // From the past, from now, and past the end of the history.
    let mut past = store.watch_from(TABLE, second).await.unwrap();
    assert!(matches!(past.next().await, Some(Change::Put(r)) if r.key == "b"));
    let mut now = store.watch_from(TABLE, revision).await.unwrap();
    assert!(matches!(store.delete_if(TABLE, "a", Expect::Revision(first)).await, Err(StoreError::Conflict { .. })));
    let removed = store.delete_if(TABLE, "a", Expect::Revision(second)).await.unwrap().unwrap();
    assert!(removed.revision > revision);
    assert_eq!(store.delete_if(TABLE, "a", Expect::Any).await.unwrap(), None);
    for watch in [&mut past, &mut now] {
        assert!(matches!(watch.next().await, Some(Change::Deleted(r)) if r.value == b"2"));
    }
    for _ in 0..2000 {
        put("b", "x", Expect::Any).await.unwrap();
    }
    assert!(matches!(store.watch_from(TABLE, second).await, Err(StoreError::Compacted(_))));
    let mut seen = 0;
    while now.next().await.is_some() {
        seen += 1;
    }
    assert!(seen < 2000, "a watch that fell behind ends instead of growing");
}

#[tokio::test]
async fn memory_keeps_the_contract() {
    contract(&MemoryStore::default()).await;
}

#[tokio::test]
async fn sqlite_keeps_the_contract_and_its_records() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state/registry.db");
    contract(&SqliteStore::open(&file).unwrap()).await;
    let store = SqliteStore::open(&file).unwrap();
    let (records, revision) = store.list(TABLE).await.unwrap();
    assert_eq!(records.len(), 1);
    assert!(matches!(store.watch_from(TABLE, revision - 1).await, Err(StoreError::Compacted(_))));
    let next = store.put_if(TABLE, "c", vec![], Expect::Absent).await.unwrap();
    assert!(next > revision, "revisions go on where they were");
}
