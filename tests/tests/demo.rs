//! The demo as a program: bad input, and a run that is killed.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test states what it expects by unwrapping it")]

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use meridio_demo::cleanup;
use meridio_tests::scene::{binary, turn};

/// Output and success of `meridio demo <args>` with a bounded life.
fn demo(args: &[&str], environment: &[(&str, &str)]) -> (String, bool) {
    let output = Command::new("timeout")
        .arg("100")
        .arg(binary().unwrap())
        .arg("demo")
        .args(args)
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (text, output.status.success())
}

#[test]
fn bad_input_is_refused_by_name_and_leaves_nothing() {
    let _turn = turn();
    for (args, named) in [
        (&["--id", "Not/Good"][..], "Not/Good"),
        (&["--only-event", "lb-explode"], "lb-explode"),
        (&["--bird", "no-such-bird"], "no-such-bird"),
    ] {
        let all: Vec<&str> = args.iter().copied().chain(["--once"]).collect();
        let (text, success) = demo(&all, &[]);
        assert!(!success && text.contains(named), "{text}");
        println!("{}", text.trim());
    }
    assert!(cleanup::namespaces(&cleanup::prefix("a")).is_empty());
}

#[test]
fn an_interface_name_that_is_too_long_is_named() {
    let _turn = turn();
    let mut command = Command::new("timeout");
    let command =
        command.arg("20").arg(binary().unwrap()).arg("frontend").env("NFE_EXTERNAL_INTERFACE", "sixteen-bytes-xx");
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    println!("{}", text.trim());
    assert!(
        !output.status.success() && text.contains("NFE_EXTERNAL_INTERFACE") && text.contains("sixteen-bytes-xx"),
        "{text}"
    );
}

#[test]
fn without_root_the_demo_says_so() {
    let _turn = turn();
    // The binary may lie where only root can read: nobody gets it by a descriptor.
    let file = std::fs::File::open(binary().unwrap()).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&file));
    let copy = std::env::temp_dir().join("meridio-e2e-nobody");
    std::fs::copy(path, &copy).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&copy)
        .args(["demo", "--once"])
        .output()
        .unwrap();
    std::fs::remove_file(&copy).unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    println!("{}", text.trim());
    assert!(!output.status.success() && text.contains("not root"), "{text}");
}

#[test]
fn a_killed_demo_leaves_nothing_that_stops_the_next_one() {
    let _turn = turn();
    let id = "kill";
    let mut child = Command::new(binary().unwrap())
        .args(["demo", "--id", id, "--skip-events", "--tcp", "100", "--udp-ports", "50"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Killed when everything runs and traffic flows.
    let deadline = Instant::now() + Duration::from_secs(90);
    for line in BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok) {
        println!("first: {line}");
        if line.contains("TCP connections") || Instant::now() > deadline {
            break;
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!cleanup::namespaces(&cleanup::prefix(id)).is_empty(), "it was killed before it made anything");
    let (text, success) = demo(&["--id", id, "--once", "--skip-events", "--tcp", "200", "--udp-ports", "200"], &[]);
    println!("{text}");
    assert!(success && text.contains("removed what a previous run left"), "the next one failed");
    assert!(cleanup::namespaces(&cleanup::prefix(id)).is_empty());
    assert_eq!(cleanup::kill_processes(id), 0, "processes were left");
    assert!(!cleanup::directory(id).exists());
}
