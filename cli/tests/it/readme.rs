//! The README's transcript, run word by word.

use std::path::Path;
use std::process::Command;

use crate::support::Process;

/// One `$ command` and the output that the README shows for it.
struct Step {
    command: String,
    shown: Vec<String>,
}

/// The steps of all ```console blocks under the heading.
fn steps(readme: &str, heading: &str) -> Vec<Step> {
    let section = readme
        .split(&format!("\n## {heading}\n"))
        .nth(1)
        .expect("the section is there");
    let section = section.split("\n## ").next().unwrap();
    let mut steps: Vec<Step> = Vec::new();
    for block in section.split("```console\n").skip(1) {
        for line in block.split("\n```").next().unwrap().lines() {
            match (line.strip_prefix("$ "), steps.last_mut()) {
                (Some(command), _) => steps.push(Step {
                    command: command.to_owned(),
                    shown: Vec::new(),
                }),
                (None, Some(step)) => step.shown.push(line.to_owned()),
                (None, None) => panic!("output before any command: {line}"),
            }
        }
    }
    steps
}

/// Whether a line is what the README shows; `…` there stands for anything.
fn matches(shown: &str, line: &str) -> bool {
    let mut parts = shown.split('…');
    let mut rest = match line.strip_prefix(parts.next().unwrap()) {
        Some(rest) => rest,
        None => return false,
    };
    let mut open = false;
    for part in parts {
        open = part.is_empty();
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    open || rest.is_empty()
}

#[test]
fn every_command_gives_what_the_readme_shows() {
    let readme =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md"))
            .unwrap();
    let mut all = steps(&readme, "Try it");
    all.extend(steps(&readme, "Operate"));
    assert!(all.len() >= 40, "{} steps", all.len());
    let dir = tempfile::tempdir().unwrap();
    let process = Process::dev(&dir.path().join("data"));
    let front = process.url.trim_start_matches("http://");
    let admin = process.admin.trim_start_matches("http://");
    let binaries = Path::new(env!("CARGO_BIN_EXE_dormouse")).parent().unwrap();
    let path = format!("{}:{}", binaries.display(), std::env::var("PATH").unwrap());
    for Step { command, shown } in all {
        let here = command
            .replace("127.0.0.1:8080", front)
            .replace("127.0.0.1:8081", admin);
        let output = Command::new("bash")
            .args(["-c", &here])
            .current_dir(dir.path())
            .env("PATH", &path)
            .env("DORMOUSE_ADMIN", &process.admin)
            .env("DORMOUSE_TARGET", &process.url)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap().replace('\r', "");
        let lines: Vec<&str> = text.trim_end().lines().collect();
        let same = lines.len() == shown.len()
            && shown
                .iter()
                .zip(&lines)
                .all(|(shown, line)| matches(shown, line));
        assert!(
            same,
            "$ {command}\nthe README shows:\n{}\nbut it gives:\n{text}",
            shown.join("\n")
        );
    }
}
