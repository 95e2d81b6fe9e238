//! Load shedding before servers that have had enough.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gateway::config::Config;
use gateway::server::RingFrom;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;

use crate::support::{Act, Front, Scripted, config, ring, runtime};

/// What a server works on at once, and for how long on each.
const AT_ONCE: usize = 4;
const SERVICE: Duration = Duration::from_millis(20);

/// A server that queues what it cannot work on, whatever comes. `/stream` and `/socket` answer with a head at
/// once, and never end.
#[derive(Clone)]
struct SlowApp {
    address: SocketAddr,
    places: Arc<Semaphore>,
    under_way: Arc<AtomicUsize>,
    /// How many others were under way when each request came.
    found: Arc<Mutex<Vec<usize>>>,
}

impl SlowApp {
    fn start(runtime: &Runtime) -> Self {
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let app = Self {
            address: listener.local_addr().unwrap(),
            places: Arc::new(Semaphore::new(AT_ONCE)),
            under_way: Arc::default(),
            found: Arc::default(),
        };
        let this = app.clone();
        runtime.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(serve(stream, this.clone()));
            }
        });
        app
    }

    /// Requests since the last look, and what nine of ten of the later half found at most.
    fn look(&self) -> (usize, usize) {
        let found = std::mem::take(&mut *self.found.lock().unwrap());
        let mut late = found[found.len() / 2..].to_vec();
        late.sort_unstable();
        (found.len(), late[late.len() * 9 / 10])
    }
}

async fn serve(mut stream: TcpStream, app: SlowApp) {
    while let Some(head) = read_head(&mut stream).await {
        let answer: &[u8] = if head.contains("/stream") {
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\ndata\n\r\n"
        } else if head.contains("/socket") {
            b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n"
        } else {
            let found = app.under_way.fetch_add(1, Ordering::Relaxed);
            app.found.lock().unwrap().push(found);
            let place = app.places.acquire().await.unwrap();
            tokio::time::sleep(SERVICE).await;
            drop(place);
            app.under_way.fetch_sub(1, Ordering::Relaxed);
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
        };
        if stream.write_all(answer).await.is_err() {
            return;
        }
    }
}

/// The next head; `None` at the end of the connection.
async fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    String::from_utf8(head).ok()
}

fn front(shedding: &str) -> (Front, SlowApp) {
    let runtime = runtime();
    let app = SlowApp::start(&runtime);
    let toml = format!(
        "routes = [{{ name = 'app', path = '/*', upstream = 'app' }}]
         [upstreams.app]
         servers = ['{}']
         {shedding}",
        app.address
    );
    let given: Config = toml::from_str(&toml).unwrap();
    let config = Config {
        routes: given.routes,
        upstreams: given.upstreams,
        ..config()
    };
    (Front::start(runtime, &config, RingFrom::Nodes), app)
}

/// Clients ask again and again until so many requests were answered. How many were answered, and refused.
fn load(front: &Front, clients: usize, answers: usize) -> (usize, usize) {
    let left = Arc::new(AtomicUsize::new(answers));
    let answered = Arc::new(AtomicUsize::new(0));
    let refused = Arc::new(AtomicUsize::new(0));
    let address = front.gateway.address();
    front.runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..clients {
            let (left, answered) = (Arc::clone(&left), Arc::clone(&answered));
            let refused = Arc::clone(&refused);
            tasks.spawn(async move {
                let mut stream = TcpStream::connect(address).await.unwrap();
                while left.load(Ordering::Relaxed) > 0 {
                    let request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";
                    stream.write_all(request).await.unwrap();
                    let head = read_head(&mut stream).await;
                    let head = head.expect("connections live on after refusals");
                    let head = head.to_lowercase();
                    let length = head.split("content-length: ").nth(1).unwrap();
                    let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
                    let mut body = vec![0; length];
                    stream.read_exact(&mut body).await.unwrap();
                    if head.starts_with("http/1.1 200 ") {
                        answered.fetch_add(1, Ordering::Relaxed);
                        let less = |left: usize| Some(left.saturating_sub(1));
                        left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
                            .unwrap();
                    } else {
                        assert!(head.starts_with("http/1.1 503 "), "{head}");
                        assert!(head.contains("dormouse-error: overloaded"), "{head}");
                        assert!(head.contains("retry-after: 1"), "{head}");
                        refused.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(SERVICE).await;
                    }
                }
            });
        }
        tasks.join_all().await;
    });
    let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
    (count(&answered), count(&refused))
}

#[test]
fn an_overload_is_refused_early_and_those_let_in_do_not_wait() {
    let (unbounded, app) = front("");
    let (_, refused) = load(&unbounded, 150, 400);
    assert_eq!(refused, 0);
    // Everybody waits for everybody: 150 clients, 4 at once.
    let (_, queued) = app.look();
    assert!(queued > 100, "{queued}");

    let (front, app) = front("shedding = { in_flight_min = 4, in_flight_max = 1000 }");
    let (_, refused) = load(&front, 2, 60);
    assert_eq!(refused, 0, "nothing waits yet");
    app.look();
    let (answered, refused) = load(&front, 150, 1000);
    assert!(refused > 0);
    let (came, waited_for) = app.look();
    assert!(waited_for < queued / 2, "{waited_for} against {queued}");
    assert_eq!(came, answered, "what was refused never came");
    front.until("nothing is under way", || {
        front.metric("gateway_concurrency_in_flight{target=\"upstreams.app\"}") == 0.0
    });
    let shed = front.metric("gateway_shed_total{target=\"upstreams.app\"}");
    assert_eq!(shed, refused as f64);

    // The overload is over: everybody is let in again.
    let limit = || front.metric("gateway_concurrency_limit{target=\"upstreams.app\"}");
    let low = limit();
    assert!(low < 150.0, "{low}");
    while limit() < 150.0 {
        load(&front, 2, 20);
    }
    let (_, refused) = load(&front, 4, 100);
    assert_eq!(refused, 0);
}

#[test]
fn what_follows_the_head_of_an_answer_holds_no_slot() {
    let (front, _app) = front("shedding = { in_flight_min = 1, in_flight_max = 1 }");
    let open = |request: &'static str| {
        front.runtime.block_on(async {
            let mut stream = TcpStream::connect(front.gateway.address()).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            let head = read_head(&mut stream).await.unwrap();
            (stream, head)
        })
    };
    let mut held = Vec::new();
    for _ in 0..3 {
        let (stream, head) = open("GET /stream HTTP/1.1\r\nhost: x\r\n\r\n");
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        held.push(stream);
        let (stream, head) = open(
            "GET /socket HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        );
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        held.push(stream);
    }
    assert_eq!(front.get("/").status, 200);
}

/// Two requests that nobody answers, and what becomes of a third while they wait and after.
fn two_slots_are_two(worker: fn(&Runtime) -> Scripted) {
    let runtime = runtime();
    let worker = worker(&runtime);
    let mut config = config();
    let shedding = "shedding = { in_flight_min = 2, in_flight_max = 2 }";
    let objects: Config = toml::from_str(&format!("[objects]\n{shedding}")).unwrap();
    config.objects = objects.objects;
    let ring = RingFrom::Document(ring(1, worker.address));
    let front = Front::start(runtime, &config, ring);
    worker.script([Act::Silence, Act::Silence]);
    let address = front.gateway.address();
    let waiting: Vec<TcpStream> = (0..2)
        .map(|_| {
            front.runtime.block_on(async {
                let mut stream = TcpStream::connect(address).await.unwrap();
                let request = b"GET /objects/Kv/a HTTP/1.1\r\nhost: x\r\n\r\n";
                stream.write_all(request).await.unwrap();
                stream
            })
        })
        .collect();
    let in_flight = || front.metric("gateway_concurrency_in_flight{target=\"objects\"}");
    front.until("both wait", || in_flight() == 2.0);
    let refused = front.post("/objects/Kv/b", "body");
    assert_eq!((refused.status, refused.code()), (503, "overloaded"));
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(refused.json()["retryable"], true);
    front.until("the worker saw them", || worker.count() == 2);
    // Clients that hang up leave their slots.
    drop(waiting);
    front.until("both are gone", || in_flight() == 0.0);
    assert_eq!(front.post("/objects/Kv/b", "body").status, 200);
    assert_eq!(in_flight(), 0.0);
}

#[test]
fn objects_behind_links_have_slots() {
    two_slots_are_two(Scripted::start);
}

#[test]
fn objects_behind_http1_have_slots() {
    two_slots_are_two(Scripted::without_links);
}

#[test]
fn a_reload_changes_the_bounds() {
    let runtime = runtime();
    let worker = Scripted::start(&runtime);
    let given = |max: u32| {
        let toml = format!("[objects.shedding]\nin_flight_min = 1\nin_flight_max = {max}");
        let objects: Config = toml::from_str(&toml).unwrap();
        Config {
            objects: objects.objects,
            ..config()
        }
    };
    let ring = RingFrom::Document(ring(1, worker.address));
    let front = Front::start(runtime, &given(7), ring);
    let limit = || front.metric("gateway_concurrency_limit{target=\"objects\"}");
    assert_eq!(limit(), 7.0);
    let reload = |max| front.runtime.block_on(front.gateway.reload(&given(max)));
    reload(9).unwrap();
    assert_eq!(limit(), 9.0);
}
