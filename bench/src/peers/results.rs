//! What a session found, for people and for programs.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use anyhow::Context;
use loadtest::Machine;
use serde::Serialize;

use super::Args;
use super::client::Measured;
use super::contenders::Question;
use super::server::Places;

/// One session.
#[derive(Debug, Clone, Serialize)]
pub struct Results {
    pub date: String,
    pub commit: &'static str,
    pub machine: Machine,
    /// 1, 5 and 15 minutes: who else was busy.
    pub load_average_before: String,
    pub load_average_after: String,
    pub server_core: u32,
    pub client_core: u32,
    pub connections: u32,
    pub seconds: f64,
    pub rounds: u32,
    pub versions: Vec<String>,
    pub tables: Vec<Table>,
    pub skipped: Vec<String>,
}

/// One question.
#[derive(Debug, Clone, Serialize)]
pub struct Table {
    pub name: &'static str,
    pub what: &'static str,
    /// Dormouse first.
    pub rows: Vec<Row>,
}

/// One contender. Medians of the rounds.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub contender: String,
    pub commands: Vec<String>,
    pub rps: f64,
    pub rounds: Vec<f64>,
    /// Of a closed loop: for comparison in this table only.
    pub p50_us: u64,
    pub p99_us: u64,
    /// Of all its processes that are measured.
    pub cpu_us_per_request: f64,
    /// Dormouse's requests per second divided by its own.
    pub dormouse_is: f64,
}

impl Row {
    pub(super) fn new(
        contender: &str,
        commands: Vec<String>,
        mut measured: Vec<(Measured, f64)>,
    ) -> Self {
        let rounds = measured.iter().map(|(found, _)| found.rps).collect();
        let middle = measured.len() / 2;
        let mut cpu: Vec<f64> = measured.iter().map(|(_, cpu)| *cpu).collect();
        cpu.sort_by(f64::total_cmp);
        measured.sort_by(|(a, _), (b, _)| a.rps.total_cmp(&b.rps));
        let (median, _) = measured.swap_remove(middle);
        Self {
            contender: contender.to_owned(),
            commands,
            rps: median.rps,
            rounds,
            p50_us: median.p50_us,
            p99_us: median.p99_us,
            cpu_us_per_request: cpu[middle],
            dormouse_is: 1.0,
        }
    }
}

impl Table {
    pub(super) fn new(question: &Question, mut rows: Vec<Row>) -> Self {
        let dormouse = rows.first().map_or(0.0, |row| row.rps);
        for row in &mut rows {
            row.dormouse_is = dormouse / row.rps.max(f64::MIN_POSITIVE);
        }
        Self {
            name: question.name,
            what: question.what,
            rows,
        }
    }
}

impl Results {
    #[expect(
        clippy::disallowed_methods,
        reason = "the date of a session is a real one"
    )]
    pub(super) fn begin(args: &Args, places: &Places) -> anyhow::Result<Self> {
        let programs = [
            (Some(&places.dormouse), "--version"),
            (places.workerd.as_ref(), "--version"),
            (places.redis.as_ref(), "--version"),
            (places.nginx.as_ref(), "-v"),
            (places.haproxy.as_ref(), "-v"),
        ];
        let versions = programs.into_iter();
        let versions = versions.filter_map(|(program, flag)| Some(version(program?, flag)));
        Ok(Self {
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            commit: loadtest::COMMIT,
            machine: Machine::this(),
            load_average_before: load_average(),
            load_average_after: String::new(),
            server_core: places.server_core,
            client_core: places.client_core,
            connections: args.connections,
            seconds: args.duration,
            rounds: args.rounds,
            versions: versions.collect::<anyhow::Result<_>>()?,
            tables: Vec::new(),
            skipped: Vec::new(),
        })
    }

    pub(super) fn end(&mut self) {
        self.load_average_after = load_average();
    }

    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("numbers, strings and lists always serialize")
    }

    pub fn to_markdown(&self) -> String {
        let mut text = String::new();
        self.write(&mut text).expect("a string takes any text");
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        writeln!(
            text,
            "`dormouse bench peers` on {}, commit {}: {} ({} cores), Linux {}. What is measured is pinned \
             to core {}, the client (one thread, {} connections, closed loop) and the apps behind proxies to \
             core {}; {} rounds of {} s each, in turns, medians. Load average before {}, after {}. Every \
             counter held exactly what was acknowledged.\n",
            self.date,
            self.commit,
            self.machine.cpu,
            self.machine.cores,
            self.machine.kernel,
            self.server_core,
            self.connections,
            self.client_core,
            self.rounds,
            self.seconds,
            self.load_average_before,
            self.load_average_after
        )?;
        writeln!(
            text,
            "| | requests/s | p50 | p99 | CPU per request | Dormouse is |\n|---|---:|---:|---:|---:|---:|"
        )?;
        for table in &self.tables {
            writeln!(text, "| **{}** | | | | | |", table.what)?;
            for (at, row) in table.rows.iter().enumerate() {
                let ratio = match (at, row.dormouse_is) {
                    (0, _) => String::new(),
                    (_, ratio) if ratio < 1.0 => format!("**{ratio:.2}×, slower**"),
                    (_, ratio) => format!("{ratio:.2}×"),
                };
                writeln!(
                    text,
                    "| {} | {:.0} | {} | {} | {:.0} µs | {ratio} |",
                    row.contender,
                    row.rps,
                    milliseconds(row.p50_us),
                    milliseconds(row.p99_us),
                    row.cpu_us_per_request
                )?;
            }
        }
        writeln!(text, "\nVersions: {}.", self.versions.join("; "))?;
        writeln!(text, "\nCommands:\n")?;
        let rows = self.tables.iter().flat_map(|table| &table.rows);
        let mut commands: Vec<&String> = rows.flat_map(|row| &row.commands).collect();
        commands.sort();
        commands.dedup();
        for command in commands {
            writeln!(text, "* `{command}`")?;
        }
        for skipped in &self.skipped {
            writeln!(text, "* {skipped}")?;
        }
        Ok(())
    }

    pub(super) fn save(&self, directory: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("make {}", directory.display()))?;
        for (name, text) in [
            ("peers.md", self.to_markdown()),
            ("peers.json", self.to_json() + "\n"),
        ] {
            let file = directory.join(name);
            std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        }
        Ok(())
    }
}

/// What a program says of itself, on one line.
fn version(program: &Path, flag: &str) -> anyhow::Result<String> {
    let output = Command::new(program)
        .arg(flag)
        .output()
        .with_context(|| format!("start {}", program.display()))?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    Ok(said.lines().next().unwrap_or("unknown").trim().to_owned())
}

fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

#[expect(clippy::cast_precision_loss, reason = "shown, not counted")]
fn milliseconds(us: u64) -> String {
    format!("{:.2} ms", us as f64 / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, rps: &[f64]) -> Row {
        let measured = rps.iter().map(|rps| {
            let found = Measured {
                sent: 10,
                rps: *rps,
                p50_us: 1,
                p99_us: 2,
                errors: 0,
                error: String::new(),
            };
            (found, 1e6 / rps)
        });
        Row::new(name, Vec::new(), measured.collect())
    }

    #[test]
    fn ratios_are_of_medians_and_losses_are_shown() {
        let question = &super::super::contenders::questions()[0];
        let rows = vec![
            row("dormouse", &[90.0, 100.0, 500.0]),
            row("slow", &[50.0, 10.0, 60.0]),
            row("fast", &[200.0, 190.0, 400.0]),
        ];
        let table = Table::new(question, rows);
        let ratios: Vec<f64> = table.rows.iter().map(|row| row.dormouse_is).collect();
        assert_eq!(ratios, [1.0, 2.0, 0.5]);
        let results = Results {
            date: "today".to_owned(),
            commit: "none",
            machine: Machine::this(),
            load_average_before: String::new(),
            load_average_after: String::new(),
            server_core: 0,
            client_core: 1,
            connections: 64,
            seconds: 1.0,
            rounds: 3,
            versions: vec!["x 1".to_owned()],
            tables: vec![table],
            skipped: vec!["skipped: workerd is not installed".to_owned()],
        };
        let text = results.to_markdown();
        for part in ["| 2.00× |", "**0.50×, slower**", "skipped: workerd", "x 1"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
