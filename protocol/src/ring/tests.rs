use proptest::prelude::*;

use super::*;

fn node(name: &str, weight: u16, workers: u16) -> RingNode {
    RingNode {
        name: name.to_owned(),
        weight,
        colo: None,
        workers: (0..workers).map(|w| format!("{name}:{w}")).collect(),
    }
}

fn ring(nodes: Vec<RingNode>) -> Ring {
    Ring::new(RingDocument {
        version: RingVersion::FIRST,
        shards: limits::SHARDS_DEFAULT,
        nodes,
    })
    .unwrap()
}

fn owners(ring: &Ring) -> Vec<(String, u16)> {
    (0..ring.shards())
        .map(|shard| {
            let owner = ring.owner(Home::Global, ShardId(shard)).unwrap();
            (owner.node.clone(), owner.index)
        })
        .collect()
}

proptest! {
    #[test]
    fn order_and_addresses_of_nodes_do_not_matter(
        weights in proptest::collection::vec(1..20u16, 1..8), turn in 0..8usize
    ) {
        let nodes: Vec<RingNode> = (0..).zip(&weights).map(|(n, w): (i32, &u16)| node(&format!("n{n}"), *w, 3)).collect();
        let mut other = nodes.clone();
        other.rotate_left(turn % nodes.len());
        for node in &mut other {
            for address in &mut node.workers {
                address.insert_str(0, "moved-");
            }
        }
        prop_assert_eq!(owners(&ring(nodes)), owners(&ring(other)));
    }

    #[test]
    fn a_new_node_takes_shards_and_moves_no_other(count in 1..12u16, weight in 1..5u16) {
        let before: Vec<RingNode> = (0..count).map(|n| node(&format!("n{n}"), 2, 2)).collect();
        let mut after = before.clone();
        after.push(node("new", weight, 2));
        for (old, new) in owners(&ring(before)).iter().zip(&owners(&ring(after))) {
            prop_assert!(new == old || new.0 == "new");
        }
    }

    #[test]
    fn a_worker_more_never_moves_a_shard_to_another_node(workers in 1..16u16) {
        let before = owners(&ring(vec![node("a", 1, workers), node("b", 1, 2)]));
        let after = owners(&ring(vec![node("a", 1, workers + 1), node("b", 1, 2)]));
        for (old, new) in before.iter().zip(&after) {
            prop_assert_eq!(&old.0, &new.0);
            prop_assert!(old == new || new.1 == workers, "only the new worker takes shards");
        }
    }

    #[test]
    fn every_shard_has_an_owner_in_its_own_colo(shard in 0..limits::SHARDS_DEFAULT) {
        let mut nodes = vec![node("a", 1, 2), node("b", 3, 2), node("c", 1, 2)];
        nodes[0].colo = Some("SFO".to_owned());
        nodes[1].colo = Some("LHR".to_owned());
        let ring = ring(nodes);
        let owner = |colo: &str| ring.owner(Home::Colo(colo.parse().unwrap()), ShardId(shard));
        prop_assert_eq!(&owner("SFO").unwrap().node, "a");
        prop_assert_eq!(&owner("LHR").unwrap().node, "b");
        prop_assert!(owner("FRA").is_err());
    }
}

#[test]
fn shares_follow_weights() {
    let ring = Ring::new(RingDocument {
        version: RingVersion::FIRST,
        shards: 4096,
        nodes: vec![node("a", 1, 1), node("b", 2, 1), node("c", 5, 1)],
    })
    .unwrap();
    let share = |name: &str| {
        owners(&ring)
            .iter()
            .filter(|(node, _)| node == name)
            .count()
    };
    assert!((400..630).contains(&share("a")), "{}", share("a"));
    assert!((900..1150).contains(&share("b")), "{}", share("b"));
    assert!((2400..2720).contains(&share("c")), "{}", share("c"));
}

/// Data lies where the ring says: these owners may never change.
#[test]
fn golden_ring() {
    let ring = ring(vec![
        node("node-1", 1, 2),
        node("node-2", 2, 1),
        node("node-3", 1, 4),
    ]);
    let text: String = owners(&ring)
        .iter()
        .map(|(node, worker)| format!("{}{worker} ", &node[5..]))
        .collect();
    assert_eq!(text.trim_end(), GOLDEN);
}

const GOLDEN: &str = "20 20 20 20 20 20 20 10 10 11 30 20 20 31 11 33 20 30 20 20 10 20 20 32 20 20 31 30 30 11 11 20 \
    32 20 20 20 30 10 10 31 31 20 32 20 30 20 10 20 20 20 20 20 31 31 20 20 20 20 20 20 20 33 20 20 \
    20 33 20 31 30 20 20 10 20 31 20 11 31 20 11 10 10 30 33 10 32 20 11 33 20 11 11 32 20 10 20 20 \
    10 20 10 11 11 32 11 32 33 31 20 20 33 20 10 20 20 20 11 10 10 20 11 20 30 20 11 20 20 11 11 20";

#[test]
fn documents_that_are_no_ring() {
    let refuse = |shards, nodes| {
        Ring::new(RingDocument {
            version: RingVersion::FIRST,
            shards,
            nodes,
        })
        .unwrap_err()
        .to_string()
    };
    let mut nowhere = node("a", 1, 1);
    nowhere.colo = Some("nowhere".to_owned());
    let refusals = [
        refuse(0, vec![node("a", 1, 1)]),
        refuse(4097, vec![node("a", 1, 1)]),
        refuse(128, vec![]),
        refuse(128, vec![node("a", 1, 1), node("a", 1, 1)]),
        refuse(128, vec![node("a", 0, 1)]),
        refuse(128, vec![node("a", 1, 0)]),
        refuse(128, vec![nowhere]),
    ];
    assert_eq!(
        refusals,
        [
            "ring.shards = 0 must be from 1 to 4096",
            "ring.shards = 4097 must be from 1 to 4096",
            "a ring of 0 nodes must have from 1 to 1024",
            "two nodes of the ring are called \"a\"",
            "node \"a\" has weight 0; it must be from 1 to 1024",
            "node \"a\" has 0 workers; it must have from 1 to 256",
            "node \"a\": colo \"nowhere\" must be three upper-case letters or digits, as in SFO, or `unknown`",
        ]
    );
}

#[test]
fn a_document_survives_json() {
    let document = RingDocument {
        version: RingVersion::FIRST,
        shards: 128,
        nodes: vec![node("a", 1, 2)],
    };
    let json = serde_json::to_string(&document).unwrap();
    assert_eq!(
        serde_json::from_str::<RingDocument>(&json).unwrap(),
        document
    );
}
