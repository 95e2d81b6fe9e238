//! The ring: which worker owns which shard. Versioned, pure, and the same in every process.
//!
//! Placement is weighted rendezvous hashing (Thaler and Ravishankar, 1998) in two steps, in integers
//! alone so that every machine agrees: a node draws once per unit of its weight for each shard and
//! the highest draw owns it, so a node's part of the shards is its part of the weight; then the
//! node's workers draw for it. Two steps, because then a node's number of workers can change without
//! a single shard (and its data) moving to another machine. A new node of weight w takes about
//! w / (sum of weights) of the shards, and no other shard moves.

use std::fmt;
use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::ids::{Colo, Home, ObjectId, ShardId};
use crate::limits;

/// Which ring is newer than which; starts at 1. Also the epoch of every shard placed by that ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RingVersion(pub NonZeroU64);

impl RingVersion {
    pub const FIRST: Self = Self(NonZeroU64::MIN);
}

impl fmt::Display for RingVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a ring is computed from, and how it travels from nodes to gateways.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingDocument {
    pub version: RingVersion,
    /// Shards of this ring; fixed for the life of the data.
    pub shards: u16,
    pub nodes: Vec<RingNode>,
}

/// One shard-node process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingNode {
    /// Placement depends on the name and the weight, never on an address.
    pub name: String,
    pub weight: u16,
    /// The site, for objects that live in one colo only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub colo: Option<String>,
    /// `host:port` of each worker.
    pub workers: Vec<String>,
}

/// One worker of one node, as the ring sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Worker {
    /// Place in the ring's list of all workers.
    pub number: usize,
    pub node: String,
    /// Place among the workers of its node.
    pub index: u16,
    pub address: String,
}

/// The shards of every home, each with its owner.
#[derive(Debug, Clone)]
pub struct Ring {
    document: RingDocument,
    workers: Vec<Worker>,
    /// Shard to index into `workers`.
    global: Vec<u32>,
    colos: Vec<(Colo, Vec<u32>)>,
}

/// Why a document is not a ring.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    #[error("ring.shards = {0} must be from 1 to {max}", max = limits::SHARDS_MAX)]
    Shards(u16),
    #[error("a ring of {0} nodes must have from 1 to {max}", max = limits::NODES_MAX)]
    Nodes(usize),
    #[error("two nodes of the ring are called {0:?}")]
    DuplicateName(String),
    #[error("node {node:?} has weight {weight}; it must be from 1 to {max}", max = limits::NODE_WEIGHT_MAX)]
    Weight { node: String, weight: u16 },
    #[error("node {node:?} has {workers} workers; it must have from 1 to {max}", max = limits::WORKERS_PER_NODE_MAX)]
    Workers { node: String, workers: usize },
    #[error("node {node:?}: {source}")]
    Colo {
        node: String,
        source: crate::ids::ColoError,
    },
}

/// No node of the ring serves this home.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no node of the ring is in colo {0}")]
pub struct NoNodeInColo(pub Colo);

impl Ring {
    /// Validates the document and places every shard. Costs shards × (sum of weights) hashes.
    pub fn new(document: RingDocument) -> Result<Self, RingError> {
        if document.shards == 0 || document.shards > limits::SHARDS_MAX {
            return Err(RingError::Shards(document.shards));
        }
        if document.nodes.is_empty() || document.nodes.len() > limits::NODES_MAX {
            return Err(RingError::Nodes(document.nodes.len()));
        }
        let mut placed = Vec::with_capacity(document.nodes.len());
        let mut workers = Vec::new();
        for node in &document.nodes {
            if placed
                .iter()
                .any(|other: &Placed<'_>| other.name == node.name)
            {
                return Err(RingError::DuplicateName(node.name.clone()));
            }
            placed.push(Placed::new(node, &mut workers)?);
        }
        let everyone: Vec<&Placed<'_>> = placed.iter().collect();
        let global = place(document.shards, &everyone);
        let mut colos: Vec<(Colo, Vec<u32>)> = Vec::new();
        for colo in placed.iter().filter_map(|node| node.colo) {
            if colos.iter().all(|(known, _)| *known != colo) {
                let here: Vec<&Placed<'_>> =
                    placed.iter().filter(|n| n.colo == Some(colo)).collect();
                colos.push((colo, place(document.shards, &here)));
            }
        }
        Ok(Self {
            global,
            colos,
            workers,
            document,
        })
    }

    pub fn version(&self) -> RingVersion {
        self.document.version
    }

    pub fn shards(&self) -> u16 {
        self.document.shards
    }

    pub fn document(&self) -> &RingDocument {
        &self.document
    }

    pub fn workers(&self) -> &[Worker] {
        &self.workers
    }

    /// Every home that some node serves.
    pub fn homes(&self) -> impl Iterator<Item = Home> {
        let colos = self.colos.iter().map(|(colo, _)| Home::Colo(*colo));
        std::iter::once(Home::Global).chain(colos)
    }

    pub fn shard_of(&self, object: ObjectId) -> ShardId {
        object.shard(self.document.shards)
    }

    /// The owner of `shard` among the nodes that serve `home`. Two array look-ups for the global ring.
    ///
    /// # Panics
    /// If `shard` came from a ring with more shards; [`shard_of`](Self::shard_of) never gives such.
    pub fn owner(&self, home: Home, shard: ShardId) -> Result<&Worker, NoNodeInColo> {
        let owners = match home {
            Home::Global => &self.global,
            Home::Colo(colo) => self
                .colos
                .iter()
                .find_map(|(known, owners)| (*known == colo).then_some(owners))
                .ok_or(NoNodeInColo(colo))?,
        };
        let worker = owners[usize::from(shard.0)];
        Ok(&self.workers[worker as usize])
    }
}

/// A node with its place in the list of all workers.
struct Placed<'a> {
    name: &'a str,
    weight: u16,
    colo: Option<Colo>,
    first_worker: u32,
    workers: u16,
}

impl<'a> Placed<'a> {
    fn new(node: &'a RingNode, all: &mut Vec<Worker>) -> Result<Self, RingError> {
        if node.weight == 0 || node.weight > limits::NODE_WEIGHT_MAX {
            return Err(RingError::Weight {
                node: node.name.clone(),
                weight: node.weight,
            });
        }
        let workers = u16::try_from(node.workers.len())
            .ok()
            .filter(|count| (1..=limits::WORKERS_PER_NODE_MAX).contains(count))
            .ok_or_else(|| RingError::Workers {
                node: node.name.clone(),
                workers: node.workers.len(),
            })?;
        let colo = match &node.colo {
            None => None,
            Some(label) => Some(label.parse().map_err(|source| RingError::Colo {
                node: node.name.clone(),
                source,
            })?),
        };
        let first_worker = u32::try_from(all.len()).expect("nodes × workers is below 2^32");
        all.extend(
            (0..workers)
                .zip(&node.workers)
                .map(|(index, address)| Worker {
                    number: first_worker as usize + usize::from(index),
                    node: node.name.clone(),
                    index,
                    address: address.clone(),
                }),
        );
        Ok(Self {
            name: &node.name,
            weight: node.weight,
            colo,
            first_worker,
            workers,
        })
    }
}

/// The owner of each shard among `nodes`, as indexes into the list of all workers.
fn place(shards: u16, nodes: &[&Placed<'_>]) -> Vec<u32> {
    (0..shards)
        .map(|shard| {
            let node = nodes
                .iter()
                .max_by_key(|node| (best_draw(node, shard), node.name))
                .expect("a ring has nodes");
            let worker = (0..node.workers)
                .max_by_key(|worker| draw(b"worker", shard, *worker))
                .expect("a node has workers");
            node.first_worker + u32::from(worker)
        })
        .collect()
}

/// The best of `weight` draws: the chance to have the best of all is the share of the weight.
fn best_draw(node: &Placed<'_>, shard: u16) -> u64 {
    (0..node.weight)
        .map(|number| draw(node.name.as_bytes(), shard, number))
        .max()
        .expect("weights are at least 1")
}

fn draw(who: &[u8], shard: u16, number: u16) -> u64 {
    xxh3_64_with_seed(who, u64::from(shard) << 16 | u64::from(number))
}

#[cfg(test)]
mod tests;
