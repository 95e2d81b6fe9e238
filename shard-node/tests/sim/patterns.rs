//! The examples of how objects work together, through deaths of the node and hours of virtual time.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value as Json, json};

use crate::alarms::{Life, World};
use crate::disk::Crash;
use crate::for_seeds;

#[path = "../../examples/patterns/classes.rs"]
pub(crate) mod classes;

const MINUTE: u64 = 60_000;
const FOR_GOOD: u64 = 1 << 40;

async fn project(life: &Life, method: &str, args: Json) -> Json {
    life.call_of("ProjectCoordinator", "bridge", method, args)
        .await
}

async fn fleet(life: &Life, method: &str, args: Json) -> Json {
    life.call_of("Fleet", "f", method, args).await
}

async fn library(life: &Life, desk: &str, method: &str, args: Json) -> Json {
    life.call_of("Library", desk, method, args).await
}

/// Rows of a list of children, by one field.
fn of_status<'a>(list: &'a Json, status: &str) -> Vec<&'a str> {
    let rows = list.as_array().unwrap().iter();
    let rows = rows.filter(|row| row["status"] == status);
    rows.map(|row| row["name"].as_str().unwrap()).collect()
}

#[test]
fn a_coordinator_delegates_to_its_tasks_and_sums_up_how_they_stand() {
    let mut world = World::new();
    world.live(Crash::LoseAll, async |life| {
        for task in ["dig", "pour", "paint"] {
            assert_eq!(project(life, "plan", json!([task])).await, true);
            assert_eq!(
                project(life, "plan", json!([task])).await,
                false,
                "it is one already"
            );
        }
        project(life, "assign", json!(["dig", "ada"])).await;
        project(life, "assign", json!(["pour", "bob"])).await;
        life.call_of("Task", "dig", "finish", json!([])).await;
        let status = project(life, "status", json!([])).await;
        let wanted = json!({ "tasks": { "done": 1, "assigned": 1, "open": 1 }, "failures": [] });
        assert_eq!(status, wanted);
    });
    world.live(Crash::Process, async |life| {
        let tasks = project(life, "tasks", json!([])).await;
        assert_eq!(of_status(&tasks, "ok"), ["dig", "paint", "pour"]);
        project(life, "drop", json!(["paint"])).await;
        let status = project(life, "status", json!([])).await;
        assert_eq!(status["tasks"], json!({ "done": 1, "assigned": 1 }));
    });
}

#[test]
fn a_task_that_fails_is_asked_again_by_the_alarm_that_the_project_uses_too() {
    let mut world = World::new();
    world.live(Crash::LoseAll, async |life| {
        for task in ["dig", "pour"] {
            project(life, "plan", json!([task])).await;
        }
        life.call_of("Task", "pour", "fail_for", json!([5000]))
            .await;
        let status = project(life, "status", json!([])).await;
        assert_eq!(
            status["tasks"],
            json!({ "open": 1 }),
            "the other one answers"
        );
        assert_eq!(status["failures"][0]["task"], "pour");
        let tasks = project(life, "tasks", json!([])).await;
        assert_eq!(of_status(&tasks, "failing"), ["pour"]);
        assert_eq!(tasks[1]["failures"], 1);
        assert_eq!(tasks[1]["error"], "Error: out of order");
    });
    // The parent's list outlives it, and so does its will to ask again: 2 and 4 seconds after a failure.
    world.live(Crash::Process, async |life| {
        life.sleep(8000).await;
        let tasks = project(life, "tasks", json!([])).await;
        assert_eq!(of_status(&tasks, "ok"), ["dig", "pour"], "{tasks}");
        let alert = project(life, "alerts", json!(["pour"])).await;
        assert_eq!(alert, json!({ "alert": null, "reviewed": null }));
        life.sleep(61 * MINUTE).await;
        let alert = project(life, "alerts", json!(["pour"])).await;
        assert_eq!(alert["reviewed"], "yes", "the project's own time came, too");
    });
}

#[test]
fn a_fleet_goes_on_without_those_that_fail_and_lists_them() {
    World::new().live(Crash::Process, async |life| {
        assert_eq!(fleet(life, "enrol", json!([100])).await, 100);
        let broken = ["f/007", "f/042", "f/099"];
        for vehicle in broken {
            // Two for a while, one for good.
            let millis = if vehicle == "f/042" { FOR_GOOD } else { 2000 };
            life.call_of("Vehicle", vehicle, "fail_for", json!([millis]))
                .await;
        }
        let driven = fleet(life, "drive", json!(["home"])).await;
        assert_eq!(driven, json!({ "driving": 97, "failures": broken }));
        life.sleep(2 * MINUTE).await;
        let states = fleet(life, "states", json!([])).await;
        assert_eq!(of_status(&states, "ok").len(), 99);
        assert_eq!(of_status(&states, "failed"), ["f/042"]);
        assert_eq!(states[42]["failures"], 5);
        assert_eq!(
            fleet(life, "lost", json!([])).await,
            "1",
            "its class was told, once"
        );
        for vehicle in ["f/000", "f/007", "f/099"] {
            let driven = life.call_of("Vehicle", vehicle, "driven", json!([])).await;
            assert_eq!(driven, 1, "{vehicle}");
        }
        // Nobody is asked any more.
        let before = life.metric("shard_activations_total");
        life.sleep(60 * MINUTE).await;
        assert_eq!(life.metric("shard_activations_total"), before);
        // One that answers is well again.
        life.call_of("Vehicle", "f/042", "fail_for", json!([0]))
            .await;
        let driven = fleet(life, "drive", json!(["away"])).await;
        assert_eq!(driven, json!({ "driving": 100, "failures": [] }));
        let states = fleet(life, "states", json!([])).await;
        assert_eq!(of_status(&states, "ok").len(), 100);
    });
}

#[test]
fn pauses_between_tries_double() {
    World::new().live(Crash::Process, async |life| {
        fleet(life, "enrol", json!([1])).await;
        life.call_of("Vehicle", "f/000", "fail_for", json!([FOR_GOOD]))
            .await;
        fleet(life, "drive", json!(["home"])).await;
        let mut pauses = Vec::new();
        let mut last = None;
        for _ in 0..200 {
            let states = fleet(life, "states", json!([])).await;
            let asked = states[0]["asked_ms"].as_u64();
            if asked != last {
                pauses.push(asked.unwrap() - last.unwrap_or(asked.unwrap()));
                last = asked;
            }
            life.sleep(200).await;
        }
        let seconds: Vec<u64> = pauses.iter().map(|pause| pause / 1000).collect();
        assert_eq!(seconds, [0, 1, 2, 4, 8], "{pauses:?}");
    });
}

#[test]
fn a_fleet_supervises_through_deaths_and_counts_each_trip_once() {
    for_seeds(6, |seed| {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut world = World::new();
        world.live(Crash::LoseAll, async |life| {
            fleet(life, "enrol", json!([20])).await;
            for vehicle in ["f/003", "f/011"] {
                life.call_of("Vehicle", vehicle, "fail_for", json!([10_000]))
                    .await;
            }
            let driven = fleet(life, "drive", json!(["home"])).await;
            assert_eq!(driven["failures"], json!(["f/003", "f/011"]));
        });
        for _ in 0..4 {
            let crash = match random.random_range(0..3) {
                0 => Crash::Process,
                1 => Crash::LoseAll,
                _ => Crash::Torn(random.random()),
            };
            let millis = random.random_range(1..3000);
            world.live(crash, async |life| life.sleep(millis).await);
        }
        world.live(Crash::Process, async |life| {
            life.sleep(2 * MINUTE).await;
            let states = fleet(life, "states", json!([])).await;
            assert_eq!(of_status(&states, "ok").len(), 20, "{states}");
            for number in 0..20 {
                let vehicle = format!("f/{number:03}");
                let driven = life.call_of("Vehicle", &vehicle, "driven", json!([])).await;
                assert_eq!(driven, 1, "{vehicle}");
            }
        });
    });
}

#[test]
fn a_chain_of_three_is_one_call() {
    World::new().live(Crash::Process, async |life| {
        let document = json!({ "title": "dormice" });
        let answer = life.call_of("Intake", "d", "pass", json!([document])).await;
        assert_eq!(answer["document"], document);
        assert_eq!(answer["hops"][0]["to"], "Review");
        assert_eq!(answer["hops"][1]["to"], "Publish");
        for stage in ["Intake", "Review", "Publish"] {
            let passed = life.call_of(stage, "d", "passed", json!([])).await;
            assert_eq!(passed, document.to_string(), "{stage}");
        }
        // What fails in the last stage is what the caller hears.
        life.call_of("Publish", "e", "fail_for", json!([MINUTE]))
            .await;
        let failed = life.try_call_of("Intake", "e", "pass", json!([1])).await;
        assert_eq!(failed.unwrap_err(), "Error: out of order");
        assert_eq!(life.call_of("Review", "e", "passed", json!([])).await, "1");
        life.sleep(MINUTE).await;
        life.call_of("Intake", "e", "pass", json!([1])).await;
    });
}

#[test]
fn a_set_fills_one_shelf_after_the_other_and_no_book_moves() {
    let mut world = World::new();
    world.live(Crash::LoseAll, async |life| {
        for number in 0..25 {
            let shelf = library(life, "town", "add", json!([format!("book {number}")])).await;
            assert_eq!(shelf, number / 10);
        }
        assert_eq!(
            library(life, "town", "known", json!([])).await,
            json!({ "version": 3, "parts": 3 })
        );
        // Another desk has the first map, and finds everything.
        let shelf = library(life, "town:b", "find", json!(["book 24"])).await;
        assert_eq!(shelf, 2);
        assert_eq!(
            library(life, "town:c", "add", json!(["book 3"])).await,
            0,
            "it is there"
        );
    });
    world.live(Crash::Process, async |life| {
        assert_eq!(
            library(life, "town", "shelves", json!([])).await,
            json!([10, 10, 5])
        );
        for number in 0..25 {
            let found = library(life, "town", "find", json!([format!("book {number}")])).await;
            assert_eq!(found, number / 10, "book {number}");
        }
        assert_eq!(
            library(life, "town", "find", json!(["none"])).await,
            Json::Null
        );
        assert_eq!(library(life, "town", "remove", json!(["book 3"])).await, 0);
        assert_eq!(
            library(life, "town", "find", json!(["book 3"])).await,
            Json::Null
        );
        // A sealed shelf takes nothing, though it has room now.
        assert_eq!(library(life, "town", "add", json!(["book 3"])).await, 2);
        assert_eq!(library(life, "town", "count", json!([])).await, 25);
    });
}

/// Desks with maps of different ages add the same books while the node dies.
#[test]
fn no_book_is_lost_or_doubled_while_the_set_grows_whatever_dies() {
    for_seeds(6, |seed| {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut world = World::new();
        let added = std::cell::RefCell::new(std::collections::BTreeMap::new());
        for _ in 0..4 {
            let crash = match random.random_range(0..3) {
                0 => Crash::Process,
                1 => Crash::LoseAll,
                _ => Crash::Torn(random.random()),
            };
            let length = std::time::Duration::from_millis(random.random_range(20..300));
            let seeds: Vec<u64> = (0..3).map(|_| random.random()).collect();
            world.live(crash, async |life| {
                let desks = seeds.iter().enumerate().map(|(desk, seed)| {
                    add_books(
                        life,
                        format!("town:{desk}"),
                        SmallRng::seed_from_u64(*seed),
                        &added,
                    )
                });
                let all = futures_util::future::join_all(desks);
                drop(tokio::time::timeout(length, all).await);
            });
        }
        world.live(Crash::Process, async |life| {
            let mut count = 0;
            for number in 0..40 {
                let title = format!("book {number}");
                let found = library(life, "town", "find", json!([title])).await;
                if let Some(shelf) = added.borrow().get(&title) {
                    assert_eq!(found, *shelf, "{title}");
                }
                count += u64::from(found != Json::Null);
            }
            assert_eq!(
                library(life, "town", "count", json!([])).await,
                count,
                "none is twice"
            );
            let known = library(life, "town", "known", json!([])).await;
            assert!(known["parts"].as_u64().unwrap() <= 4, "{known}");
        });
    });
}

async fn add_books(
    life: &Life,
    desk: String,
    mut random: SmallRng,
    added: &std::cell::RefCell<std::collections::BTreeMap<String, Json>>,
) {
    loop {
        let title = format!("book {}", random.random_range(0..40));
        let shelf = life
            .try_call_of("Library", &desk, "add", json!([title]))
            .await;
        life.sleep(random.random_range(1..10)).await;
        let Ok(shelf) = shelf else { continue };
        let before = added.borrow_mut().insert(title.clone(), shelf.clone());
        assert!(
            before.is_none_or(|before| before == shelf),
            "{title} has moved"
        );
    }
}
