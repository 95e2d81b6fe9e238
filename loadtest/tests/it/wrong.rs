//! A server that lies is found out.

use crate::server::{Fault, run, start};

const LOAD: [&str; 6] = ["--rate", "300", "--duration", "1", "--connections", "8"];

#[test]
fn a_lost_increment_fails_the_run() {
    let report = run(&start(Fault::Forget { every: 50 }), &LOAD);
    let verification = &report.verification;
    assert!(
        verification.found < verification.acknowledged,
        "{verification:?}"
    );
    assert!(!verification.passed());
    assert!(report.to_text().ends_with("FAILED"));
}

#[test]
fn an_increment_that_counts_twice_fails_the_run() {
    let report = run(&start(Fault::Repeat { every: 50 }), &LOAD);
    assert!(report.verification.surplus > 0, "{:?}", report.verification);
    assert!(!report.verification.passed());
}

#[test]
fn a_read_that_misses_an_acknowledged_write_fails_the_run() {
    let load = [&LOAD[..], &["--scenario", "increment,read"]].concat();
    let report = run(&start(Fault::ReadTheOld), &load);
    let verification = &report.verification;
    assert!(verification.wrong_answers > 0, "{verification:?}");
    let first = verification.wrong_answer.as_ref().unwrap();
    assert!(first.contains("were possible"), "{first}");
    assert!(!verification.passed());
}
