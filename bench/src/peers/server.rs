//! Servers that are measured: started on their core, watched for the CPU they take, killed in the end.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use loadtest::process::{Cluster, Process};
use tempfile::TempDir;

use super::Args;
use super::client::{self, Protocol};

/// How long a server may take until it listens.
const START_MAX: u32 = 500;
const START_STEP: Duration = Duration::from_millis(20);

/// What a contender cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needs {
    Nothing,
    Workerd,
    Redis,
    Nginx,
    HaProxy,
    /// As an app behind proxies.
    NginxAsApp,
}

/// Which programs there are, and the cores.
pub(super) struct Places {
    pub(super) dormouse: PathBuf,
    pub(super) workerd: Option<PathBuf>,
    pub(super) redis: Option<PathBuf>,
    pub(super) nginx: Option<PathBuf>,
    pub(super) haproxy: Option<PathBuf>,
    pub(super) server_core: u32,
    pub(super) client_core: u32,
}

impl Places {
    pub(super) fn find(args: &Args) -> anyhow::Result<Self> {
        let dormouse = match &args.dormouse {
            Some(file) => file.clone(),
            None => std::env::current_exe().context("find this program")?,
        };
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let last = u32::try_from(cores)?.saturating_sub(1);
        ensure!(
            found("taskset").is_some(),
            "taskset is not installed: apt-get install util-linux"
        );
        Ok(Self {
            dormouse,
            workerd: args.workerd.clone().or_else(|| found("workerd")),
            redis: found("redis-server"),
            nginx: found("nginx"),
            haproxy: found("haproxy"),
            server_core: args.server_core,
            client_core: args.client_core.unwrap_or(last),
        })
    }

    /// What to install, if it is not there.
    pub(super) fn missing(&self, needs: Needs) -> Option<String> {
        let (program, place, how) = match needs {
            Needs::Nothing => return None,
            Needs::Workerd => (
                "workerd",
                &self.workerd,
                "npm install workerd, and --workerd node_modules/workerd/bin/workerd",
            ),
            Needs::Redis => ("redis-server", &self.redis, "apt-get install redis-server"),
            Needs::Nginx | Needs::NginxAsApp => ("nginx", &self.nginx, "apt-get install nginx"),
            Needs::HaProxy => ("haproxy", &self.haproxy, "apt-get install haproxy"),
        };
        let missing = place.is_none() || (needs == Needs::HaProxy && self.nginx.is_none());
        missing.then(|| format!("skipped: {program} is not installed: {how}"))
    }

    /// `taskset` for one core.
    pub(super) fn on(core: u32) -> Vec<String> {
        vec!["taskset".to_owned(), "-c".to_owned(), core.to_string()]
    }
}

/// A program in PATH, or where administrators' programs are.
fn found(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    places
        .map(|place| place.join(program))
        .find(|file| file.is_file())
}

/// A process that listens on a port. Killed when dropped.
pub(super) struct Daemon {
    child: Child,
    pub(super) command: String,
}

impl Daemon {
    /// Starts it on a core and waits until it listens.
    pub(super) fn start(
        core: u32,
        program: &Path,
        arguments: &[&str],
        address: SocketAddr,
    ) -> anyhow::Result<Self> {
        let mut command = Command::new("taskset");
        command
            .args(["-c", &core.to_string()])
            .arg(program)
            .args(arguments);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let words = std::iter::once(program.display().to_string());
        let words = words.chain(arguments.iter().map(|word| (*word).to_owned()));
        let mut daemon = Self {
            child,
            command: words.collect::<Vec<_>>().join(" "),
        };
        for _ in 0..START_MAX {
            if TcpStream::connect(address).is_ok() {
                return Ok(daemon);
            }
            if let Some(status) = daemon.child.try_wait()? {
                bail!("{} ended with {status}", daemon.command);
            }
            pause();
        }
        bail!("{} does not listen on {address}", daemon.command)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A port that nobody listens on at the moment.
pub(super) fn free_address() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port")?;
    Ok(listener.local_addr()?)
}

/// One contender, ready.
pub(super) struct Running {
    pub(super) address: SocketAddr,
    pub(super) protocol: Protocol,
    pub(super) requests: Rc<[Vec<u8>]>,
    /// Their answers add up to what was counted; none: nothing was.
    pub(super) reads: Vec<Vec<u8>>,
    pub(super) commands: Vec<String>,
    pub(super) measured: Vec<Daemon>,
    pub(super) cluster: Option<Cluster>,
    /// A gateway without a node.
    pub(super) gateway: Option<Process>,
    /// What is not measured, such as apps behind a proxy.
    pub(super) _others: Vec<Daemon>,
    // Last: the processes end before their data does.
    pub(super) _data: TempDir,
}

impl Running {
    /// Runs `f` and gives the microseconds of CPU that the servers took meanwhile, to 10 ms.
    pub(super) fn cpu_during<T>(&self, f: impl FnOnce() -> T) -> anyhow::Result<(T, f64)> {
        let before = self.cpu_us()?;
        let result = f();
        Ok((result, self.cpu_us()? - before))
    }

    fn cpu_us(&self) -> anyhow::Result<f64> {
        let own = self.measured.iter().map(|daemon| daemon.child.id());
        let cluster = self.cluster.iter();
        let cluster = cluster
            .flat_map(|one| [one.node.id(), one.gateway.id()])
            .flatten();
        let gateway = self.gateway.iter().filter_map(Process::id);
        own.chain(cluster).chain(gateway).map(cpu_us).sum()
    }

    /// The sum of all counters.
    pub(super) fn total(&self) -> anyhow::Result<Option<u64>> {
        if self.reads.is_empty() {
            return Ok(None);
        }
        let mut total = 0;
        for read in &self.reads {
            let value = client::ask(self.address, self.protocol, read)?;
            total += count(&value).with_context(|| format!("{value:?} is no count"))?;
        }
        Ok(Some(total))
    }
}

/// A number, or the value of a sharded counter.
fn count(answer: &str) -> Option<u64> {
    let answer: serde_json::Value = serde_json::from_str(answer.trim()).ok()?;
    answer.get("value").unwrap_or(&answer).as_u64()
}

/// User and system time of a process and its threads (proc(5), /proc/pid/stat, fields 14 and 15).
fn cpu_us(pid: u32) -> anyhow::Result<f64> {
    let file = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
    // The name, in parentheses, may hold spaces.
    let (_, fields) = text.rsplit_once(") ").context("a process has a name")?;
    let fields: Vec<&str> = fields.split(' ').collect();
    let ticks = |at: usize| -> anyhow::Result<f64> {
        let field = fields.get(at).context("the line is whole")?;
        Ok(field.parse()?)
    };
    let per_second = client::count(rustix::param::clock_ticks_per_second());
    Ok((ticks(11)? + ticks(12)?) * 1e6 / per_second)
}

#[expect(
    clippy::disallowed_methods,
    reason = "a process that starts is waited for"
)]
fn pause() {
    std::thread::sleep(START_STEP);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_of_this_process_is_known() {
        assert!(cpu_us(std::process::id()).unwrap() >= 0.0);
        assert!(cpu_us(u32::MAX).is_err());
    }

    #[test]
    fn what_is_missing_is_named_with_the_way_to_get_it() {
        let places = Places {
            dormouse: PathBuf::new(),
            workerd: None,
            redis: Some(PathBuf::new()),
            nginx: None,
            haproxy: Some(PathBuf::new()),
            server_core: 0,
            client_core: 1,
        };
        assert_eq!(places.missing(Needs::Nothing), None);
        assert_eq!(places.missing(Needs::Redis), None);
        let workerd = places.missing(Needs::Workerd).unwrap();
        assert!(workerd.contains("npm install workerd"), "{workerd}");
        // There is no app behind it.
        assert!(places.missing(Needs::HaProxy).is_some());
    }
}
