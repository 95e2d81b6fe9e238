//! A node with the classes of [`classes`]: `cargo run -p dormouse-shard-node --example patterns`, with a gateway
//! before it. The tests in `tests/sim/patterns.rs` run them through deaths and hours of virtual time.

mod classes;

use shard_node::classes::Classes;
use shard_node::config::Config;
use shard_node::node::Node;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let classes = classes::added_to(Classes::built_in());
    let node = Node::start(&Config::default(), &classes)?;
    ops::process::print_line(&format!("workers listen at {:?}", node.addresses()));
    loop {
        std::thread::park();
    }
}
