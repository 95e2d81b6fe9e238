//! A new gateway takes over the listening sockets of the one that runs: no connection is refused or reset.
//!
//! The one that runs waits at the Unix socket `upgrade_socket`. `gateway --upgrade` connects there. Both must be
//! of one user, or the new one root's. Then, on that connection:
//!
//! | from | bytes | meaning |
//! |---|---|---|
//! | old | 1 | the version of all this |
//! | old | 1, with a descriptor | a listening socket; the byte says of which [`Kind`]; any number of them |
//! | old | `.` | that was the last one |
//! | new | `R` | it accepts connections; the old one stops to |
//! | old | 16 each | a purge of the cache, until its last request is done and it ends |
//!
//! The sockets are the same, not new ones on the same port: what waits in their queues is accepted by either.
//! If the new one ends before its `R`, the old one has changed nothing, and waits for the next.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ops::Causes;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tracing::{info, warn};

use crate::cache::{Cache, Moment, TAG_BYTES, Tag};

const VERSION: u8 = 1;
const END: u8 = b'.';
const READY: u8 = b'R';

/// How long the old gateway may take to hand over its sockets.
const HAND_OVER_MAX: Duration = Duration::from_secs(10);

/// What a socket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Plain,
    Tls,
    Admin,
}

impl Kind {
    fn byte(self) -> u8 {
        match self {
            Self::Plain => b'p',
            Self::Tls => b't',
            Self::Admin => b'a',
        }
    }

    fn of(byte: u8) -> Option<Self> {
        [Self::Plain, Self::Tls, Self::Admin]
            .into_iter()
            .find(|kind| kind.byte() == byte)
    }
}

/// Listening sockets, and what each is for.
#[derive(Default)]
pub struct Sockets(Vec<(Kind, TcpListener)>);

impl Sockets {
    pub fn push(&mut self, kind: Kind, socket: TcpListener) {
        self.0.push((kind, socket));
    }

    /// Takes those of a kind that listen where a config wants it. Port 0 is any port.
    ///
    /// # Errors
    /// When the address cannot be resolved.
    pub fn take(&mut self, kind: Kind, address: &str) -> io::Result<Vec<TcpListener>> {
        if self.0.is_empty() {
            return Ok(Vec::new());
        }
        let wanted: Vec<SocketAddr> = address.to_socket_addrs()?.collect();
        let fits = |bound: SocketAddr| {
            let fits = |wanted: &SocketAddr| {
                wanted.ip() == bound.ip() && [0, bound.port()].contains(&wanted.port())
            };
            wanted.iter().any(fits)
        };
        let mut taken = Vec::new();
        for (found, socket) in std::mem::take(&mut self.0) {
            if found == kind && socket.local_addr().is_ok_and(fits) {
                taken.push(socket);
            } else {
                self.0.push((found, socket));
            }
        }
        Ok(taken)
    }
}

/// Why nothing was taken over.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    #[error("upgrade_socket is empty: name the socket at which the running gateway waits")]
    NoSocket,
    #[error("ask the gateway at {path} for its sockets")]
    Ask { path: PathBuf, source: io::Error },
    #[error(
        "the gateway at {path} hands over by version {version} of the rules, this one knows {VERSION}"
    )]
    Version { path: PathBuf, version: u8 },
    #[error("wait for a successor at {path}")]
    Wait { path: PathBuf, source: io::Error },
    #[error("a gateway waits at {path} already; take over from it with --upgrade")]
    Taken { path: PathBuf },
}

/// The old gateway, as the new one sees it.
pub struct Predecessor {
    stream: BlockingStream,
}

impl Predecessor {
    /// Asks it for its sockets. `None`: nobody is there. Blocks, at a start.
    pub fn ask(path: &Path) -> Result<Option<(Self, Sockets)>, UpgradeError> {
        let failed = |source| UpgradeError::Ask {
            path: path.to_owned(),
            source,
        };
        let stream = match BlockingStream::connect(path) {
            Ok(stream) => stream,
            Err(error) if nobody(&error) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        stream
            .set_read_timeout(Some(HAND_OVER_MAX))
            .map_err(failed)?;
        let (version, _) = receive(&stream).map_err(failed)?;
        if version != VERSION {
            let path = path.to_owned();
            return Err(UpgradeError::Version { path, version });
        }
        let mut sockets = Sockets::default();
        loop {
            let (byte, socket) = receive(&stream).map_err(failed)?;
            match (Kind::of(byte), socket) {
                (Some(kind), Some(socket)) => sockets.push(kind, TcpListener::from(socket)),
                _ if byte == END => return Ok(Some((Self { stream }, sockets))),
                // What a later version also hands over.
                _ => {}
            }
        }
    }

    /// Tells it to stop accepting.
    ///
    /// # Errors
    /// When it is gone. Its sockets are here, so nothing is lost.
    pub fn relieve(&mut self) -> io::Result<()> {
        self.stream.write_all(&[READY])
    }

    /// Takes over its purges until it has ended.
    ///
    /// # Errors
    /// When it is gone.
    pub async fn follow(self, cache: &'static Cache) -> io::Result<()> {
        self.stream.set_nonblocking(true)?;
        let mut stream = UnixStream::from_std(self.stream)?;
        let mut tag = [0; TAG_BYTES];
        loop {
            match stream.read_exact(&mut tag).await {
                Ok(_) => drop(cache.purge(&[Tag::from_bytes(tag)])),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

fn nobody(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    [ConnectionRefused, NotFound].contains(&error.kind())
}

/// One byte, and the descriptor that came with it.
fn receive(stream: &BlockingStream) -> io::Result<(u8, Option<OwnedFd>)> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut messages = control.drain();
    let socket = messages.find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
        _ => None,
    });
    Ok((byte[0], socket))
}

/// Where a successor asks.
pub struct Offer {
    listener: UnixListener,
    path: PathBuf,
}

/// The new gateway, as the old one sees it.
pub struct Successor {
    stream: UnixStream,
    /// It knows of purges up to here.
    told: Moment,
}

impl Offer {
    /// Waits at a path from now on, in the place of what waited there before, if that is gone or (`relieved`)
    /// about to go.
    pub fn at(path: &Path, relieved: bool) -> Result<Self, UpgradeError> {
        if !relieved && BlockingStream::connect(path).is_ok() {
            return Err(UpgradeError::Taken {
                path: path.to_owned(),
            });
        }
        let bind = || {
            // Under another name first: there is always somebody at the path, and nobody but us may ask.
            let mut beside = path.as_os_str().to_owned();
            beside.push(format!(".{}", std::process::id()));
            let beside = PathBuf::from(beside);
            if let Err(error) = std::fs::remove_file(&beside)
                && error.kind() != io::ErrorKind::NotFound
            {
                return Err(error);
            }
            let listener = UnixListener::bind(&beside)?;
            std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o600))?;
            std::fs::rename(&beside, path)?;
            Ok(listener)
        };
        let listener = bind().map_err(|source| UpgradeError::Wait {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Hands the sockets to whoever asks, until one of them is ready to go on with them.
    pub async fn accepted(&self, sockets: &Sockets, cache: &Cache) -> Successor {
        loop {
            let handed = match self.listener.accept().await {
                Ok((stream, _)) => hand_over(stream, sockets, cache).await,
                Err(error) => {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    Err(error)
                }
            };
            match handed {
                Ok(successor) => return successor,
                Err(error) => {
                    warn!(error = %Causes(&error), "a successor did not start; this gateway goes on");
                }
            }
        }
    }

    /// Nobody shall ask any more.
    pub fn withdraw(self) {
        // It is in nobody's way but ours.
        drop(std::fs::remove_file(&self.path));
    }
}

async fn hand_over(
    mut stream: UnixStream,
    sockets: &Sockets,
    cache: &Cache,
) -> io::Result<Successor> {
    let asking = stream.peer_cred()?.uid();
    if ![0, rustix::process::getuid().as_raw()].contains(&asking) {
        let error = format!("user {asking} asked for the sockets of another");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, error));
    }
    let told = cache.moment();
    send(&stream, VERSION, None).await?;
    for (kind, socket) in &sockets.0 {
        send(&stream, kind.byte(), Some(socket.as_fd())).await?;
    }
    send(&stream, END, None).await?;
    info!("sockets handed to a successor");
    match stream.read_u8().await? {
        READY => Ok(Successor { stream, told }),
        byte => Err(io::Error::other(format!("it answered {byte}"))),
    }
}

async fn send(stream: &UnixStream, byte: u8, socket: Option<BorrowedFd<'_>>) -> io::Result<()> {
    stream
        .async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let sockets = socket.as_slice();
            if !sockets.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(sockets));
            }
            let byte = [byte];
            sendmsg(
                stream,
                &[IoSlice::new(&byte)],
                &mut control,
                SendFlags::NOSIGNAL,
            )?;
            Ok(())
        })
        .await
}

impl Successor {
    /// Tells it what was purged here since.
    ///
    /// # Errors
    /// When it is gone.
    pub async fn tell(&mut self, cache: &Cache) -> io::Result<()> {
        let (now, tags) = cache.purged_after(self.told);
        for tag in tags.unwrap_or_else(|| vec![Tag::EVERYTHING]) {
            self.stream.write_all(&tag.to_bytes()).await?;
        }
        self.told = now;
        Ok(())
    }
}
