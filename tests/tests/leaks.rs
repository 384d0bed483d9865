//! Nothing is left of connections that are closed: client, manager, forwarder and endpoint in one process, whose descriptors and tasks are
//! counted before and after. `cargo bench --bench nsm leaks` does the same with larger numbers.

#![allow(clippy::unwrap_used)] // Tests state what they expect by unwrapping it.

use meridio_tests::leaks;

#[test]
fn cycles_leave_neither_descriptors_nor_tasks() {
    let report = leaks::run(leaks::Cycles { nothing: 500, veth: 60 }).unwrap();
    println!("{report:#?}");
    assert_eq!(report.left(), Vec::<String>::new());
}
