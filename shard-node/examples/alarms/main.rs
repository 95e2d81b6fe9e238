//! A node with the classes of [`classes`]: `cargo run -p dormouse-shard-node --example alarms`, with a gateway
//! before it. The tests in `tests/sim/examples.rs` run them through hours of virtual time.

mod classes;

use shard_node::config::Config;
use shard_node::node::Node;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let node = Node::start(&Config::default(), &classes::classes())?;
    ops::process::print_line(&format!("workers listen at {:?}", node.addresses()));
    loop {
        std::thread::park();
    }
}
