//! The examples of what alarms are for, through days of virtual time, with crashes.

use serde_json::json;

use crate::alarms::World;
use crate::disk::Crash;

#[path = "../../examples/alarms/classes.rs"]
pub(crate) mod classes;

const MINUTE: u64 = 60_000;
const HOUR: u64 = 60 * MINUTE;

#[test]
fn a_periodic_task_runs_every_minute_through_crashes() {
    let mut world = World::new();
    world.live(Crash::LoseAll, async |life| {
        life.call_of("Heartbeat", "h", "start", json!([])).await;
        life.sleep(10 * MINUTE + 1000).await;
        let beats = life.call_of("Heartbeat", "h", "beats", json!([])).await;
        assert_eq!(beats, 10);
        life.sleep(30_000).await;
    });
    world.live(Crash::Process, async |life| {
        life.sleep(10 * MINUTE).await;
        let beats = life.call_of("Heartbeat", "h", "beats", json!([])).await;
        assert_eq!(beats, 20, "none lost, none doubled");
        life.call_of("Heartbeat", "h", "stop", json!([])).await;
        life.sleep(HOUR).await;
        assert_eq!(life.call_of("Heartbeat", "h", "beats", json!([])).await, 20);
    });
}

#[test]
fn a_timeout_moves_with_every_use() {
    World::new().live(Crash::Process, async |life| {
        for _ in 0..5 {
            life.call_of("Session", "s", "touch", json!([])).await;
            life.sleep(29 * MINUTE).await;
            assert_eq!(
                life.call_of("Session", "s", "state", json!([])).await,
                "open"
            );
        }
        life.sleep(2 * MINUTE).await;
        assert_eq!(
            life.call_of("Session", "s", "state", json!([])).await,
            "closed"
        );
    });
}

#[test]
fn a_delayed_action_happens_after_its_time_also_if_that_was_missed() {
    let mut world = World::new();
    world.live(Crash::LoseAll, async |life| {
        life.call_of("Reminder", "r", "remind", json!(["tea", 5 * MINUTE]))
            .await;
        life.sleep(4 * MINUTE).await;
        assert_eq!(
            life.call_of("Reminder", "r", "said", json!([])).await,
            json!(null)
        );
    });
    // Nobody is there when it is due.
    world.pass(HOUR);
    world.live(Crash::Process, async |life| {
        life.sleep(5_000).await;
        assert_eq!(
            life.call_of("Reminder", "r", "said", json!([])).await,
            "tea"
        );
    });
}

#[test]
fn an_object_deletes_itself_when_its_time_has_come() {
    World::new().live(Crash::Process, async |life| {
        life.call_of("Draft", "d", "save", json!(["dear"])).await;
        life.sleep(50 * MINUTE).await;
        life.call_of("Draft", "d", "save", json!(["dear all"]))
            .await;
        life.sleep(50 * MINUTE).await;
        assert_eq!(
            life.call_of("Draft", "d", "text", json!([])).await,
            "dear all"
        );
        life.sleep(11 * MINUTE).await;
        assert!(!life.exists("Draft", "d"), "nothing of it is stored");
        assert_eq!(
            life.call_of("Draft", "d", "text", json!([])).await,
            json!(null)
        );
    });
}

#[test]
fn a_message_that_nobody_acknowledges_comes_again() {
    let mut world = World::new();
    world.live(Crash::LoseAll, async |life| {
        life.call_of("Queue", "q", "send", json!(["job"])).await;
        let lease = json!([{ "visibilityMs": 10 * MINUTE }]);
        let got = life.call_of("Queue", "q", "receive", lease.clone()).await;
        assert_eq!(got[0]["body"], "job");
        let got = life.call_of("Queue", "q", "receive", lease).await;
        assert_eq!(got, json!([]), "it is leased");
        life.sleep(1_000).await;
    });
    world.live(Crash::Process, async |life| {
        life.sleep(11 * MINUTE).await;
        let got = life.call_of("Queue", "q", "receive", json!([])).await;
        assert_eq!(
            (&got[0]["body"], &got[0]["attempts"]),
            (&json!("job"), &json!(2))
        );
    });
}
