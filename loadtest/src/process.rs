//! Processes that a load test starts, or is told of, and the signals it sends them.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};
use rand::Rng;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A process that can be signalled, and perhaps started again.
pub struct Process {
    name: String,
    kind: Kind,
}

enum Kind {
    /// Somebody else's.
    Foreign(Pid),
    Own {
        command: Vec<String>,
        child: Option<Child>,
    },
}

/// What a server says of itself when it is ready.
#[derive(Debug, Clone)]
pub struct Ready {
    /// `http://host:port`, as is `admin`.
    pub url: String,
    pub admin: String,
}

impl Process {
    pub(crate) fn foreign(name: &str, pid: i32) -> anyhow::Result<Self> {
        // Below, signals go to groups, and to everything.
        let pid = (pid > 1).then(|| Pid::from_raw(pid)).flatten();
        let pid = pid.with_context(|| format!("process {name}: a process id is above 1"))?;
        Ok(Self {
            name: name.to_owned(),
            kind: Kind::Foreign(pid),
        })
    }

    /// A command that prints a line when it is ready. It is killed when this is dropped.
    pub fn own(name: &str, command: Vec<String>) -> Self {
        Self {
            name: name.to_owned(),
            kind: Kind::Own {
                command,
                child: None,
            },
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn can_start(&self) -> bool {
        matches!(self.kind, Kind::Own { .. })
    }

    pub fn id(&self) -> Option<u32> {
        match &self.kind {
            Kind::Foreign(pid) => u32::try_from(pid.as_raw_nonzero().get()).ok(),
            Kind::Own { child, .. } => child.as_ref().map(Child::id),
        }
    }

    /// Starts it and waits for its first line, which it returns.
    pub fn start(&mut self) -> anyhow::Result<String> {
        let Kind::Own { command, child } = &mut self.kind else {
            bail!(
                "process {} was not started here, so it cannot be",
                self.name
            );
        };
        let (program, arguments) = command.split_first().context("the command is empty")?;
        let mut started = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {program}"))?;
        let output = started.stdout.take().context("a pipe was asked for")?;
        *child = Some(started);
        let mut lines = BufReader::new(output).lines();
        let Some(Ok(line)) = lines.next() else {
            let said = command.join(" ");
            self.wait()?;
            bail!("{said} ended before it was ready");
        };
        // Whatever else it prints must not block it.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(line)
    }

    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = match &self.kind {
            Kind::Foreign(pid) => *pid,
            Kind::Own { child, .. } => {
                let child = child.as_ref();
                let child = child.with_context(|| format!("{} does not run", self.name))?;
                Pid::from_child(child)
            }
        };
        kill_process(pid, signal).with_context(|| format!("signal {}", self.name))
    }

    /// Waits until it has ended; nothing to wait for if it is somebody else's.
    pub(crate) fn wait(&mut self) -> anyhow::Result<()> {
        if let Kind::Own { child, .. } = &mut self.kind
            && let Some(mut child) = child.take()
        {
            child.wait().context("wait for a process")?;
        }
        Ok(())
    }

    /// SIGTERM, and its end.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.signal(Signal::TERM)?;
        self.wait()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Kind::Own { child, .. } = &mut self.kind
            && let Some(child) = child
        {
            // It may have ended already.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// A node and a gateway of this program, on free ports, with data that is deleted in the end.
pub struct Cluster {
    pub node: Process,
    pub gateway: Process,
    pub node_ready: Ready,
    pub gateway_ready: Ready,
    // Last: the processes end before their data does.
    data: TempDir,
}

/// How a cluster is started.
#[derive(Debug, Clone, Default)]
pub struct ClusterShape {
    /// The `dormouse` binary.
    pub program: PathBuf,
    /// Put before each command, such as `taskset -c 0`.
    pub before: Vec<String>,
    /// Threads that host objects; 0 is one per core.
    pub workers: u32,
    /// Threads of the gateway; 0 is one per core.
    pub threads: u32,
    /// The gateway's configuration file.
    pub config: Option<PathBuf>,
}

/// A loopback host that is most likely nobody else's: on Linux, all of 127.0.0.0/8 is this machine.
///
/// What listens there on a port that the system chose gets that port again after it was killed: at 127.0.0.1,
/// any connection or process could have taken it in between.
pub fn loopback_host() -> String {
    if cfg!(target_os = "linux") {
        // Not 127.0.0.0/16, where people have their own.
        let [a, b, c] =
            [1..=254, 0..=255, 1..=254].map(|part| rand::rng().random_range::<u8, _>(part));
        format!("127.{a}.{b}.{c}")
    } else {
        "127.0.0.1".to_owned()
    }
}

impl Cluster {
    pub fn start(shape: &ClusterShape) -> anyhow::Result<Self> {
        let data = tempfile::tempdir().context("make a directory for data")?;
        let listen = format!("{}:0", loopback_host());
        let mut node = Process::own("node", node(shape, data.path(), &listen, &listen)?);
        let node_ready = Ready::parse(&node.start()?)?;
        let workers = node_ready.address().to_owned();
        let mut gateway = Process::own("gateway", front(shape, &workers, &listen, &listen)?);
        let gateway_ready = Ready::parse(&gateway.start()?)?;
        Ok(Self {
            node,
            gateway,
            node_ready,
            gateway_ready,
            data,
        })
    }

    /// The processes, and the directory that must outlive them.
    pub(crate) fn into_parts(self) -> (Vec<Process>, TempDir) {
        (vec![self.node, self.gateway], self.data)
    }

    /// From now on, what is started again listens where it did.
    pub(crate) fn stay(&mut self, shape: &ClusterShape) -> anyhow::Result<()> {
        let (at, admin) = (self.node_ready.address(), self.node_ready.admin_address());
        let node = node(shape, self.data.path(), at, admin)?;
        let (here, admin) = (
            self.gateway_ready.address(),
            self.gateway_ready.admin_address(),
        );
        let gateway = front(shape, at, here, admin)?;
        for (process, new) in [(&mut self.node, node), (&mut self.gateway, gateway)] {
            if let Kind::Own { command, .. } = &mut process.kind {
                *command = new;
            }
        }
        Ok(())
    }
}

impl Ready {
    /// From `ready URL admin URL`.
    pub fn parse(line: &str) -> anyhow::Result<Self> {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["ready", url, "admin", admin] => Ok(Self {
                url: url.to_owned(),
                admin: admin.to_owned(),
            }),
            _ => bail!("{line:?} is not \"ready URL admin URL\""),
        }
    }

    pub fn address(&self) -> &str {
        self.url.trim_start_matches("http://")
    }

    pub fn admin_address(&self) -> &str {
        self.admin.trim_start_matches("http://")
    }
}

fn node(
    shape: &ClusterShape,
    data: &Path,
    listen: &str,
    admin: &str,
) -> anyhow::Result<Vec<String>> {
    let mut command = command(shape, "node", listen, admin)?;
    let data = data.to_str().context("the path of data is text")?;
    command.extend(["--data-dir".to_owned(), data.to_owned()]);
    command.extend(["--workers".to_owned(), shape.workers.to_string()]);
    Ok(command)
}

fn front(
    shape: &ClusterShape,
    workers: &str,
    listen: &str,
    admin: &str,
) -> anyhow::Result<Vec<String>> {
    let mut command = command(shape, "gateway", listen, admin)?;
    command.extend(["--nodes".to_owned(), workers.to_owned()]);
    command.extend(["--threads".to_owned(), shape.threads.to_string()]);
    if let Some(file) = &shape.config {
        let file = file.to_str().context("the path of a config is text")?;
        command.extend(["--config".to_owned(), file.to_owned()]);
    }
    Ok(command)
}

fn command(
    shape: &ClusterShape,
    what: &str,
    listen: &str,
    admin: &str,
) -> anyhow::Result<Vec<String>> {
    let program = shape
        .program
        .to_str()
        .context("the program's path is text")?;
    let words = [program, what, "--listen", listen, "--admin-listen", admin];
    let words = words.into_iter().map(str::to_owned);
    Ok(shape.before.iter().cloned().chain(words).collect())
}
