//! Provides free ports that remain free until they are used. Asking the kernel for a free port and binding it later
//! would be a race, and a restarted server needs its previous port. Therefore each test process reserves a block of
//! ports by binding the block's first port, and hands out the others. The blocks do not overlap with the kernel's
//! ephemeral ports or with the ports of `./dev up`.

use std::{
    net::{Ipv4Addr, TcpListener},
    ops::Range,
    process,
    sync::Mutex,
};

/// Numbers of the port blocks, which contain the ports 20,000 to 26,899. Few servers listen on these ports, and
/// MongoDB's port 27,017 is not among them.
const BLOCKS: Range<u16> = 200..269;
const BLOCK_SIZE: u16 = 100;

/// The ports that this test process has reserved.
struct Owned {
    /// Listeners that reserve blocks: each is bound to the first port of a block.
    claims: Vec<TcpListener>,
    /// The unused ports of the block that was reserved last.
    free: Range<u16>,
}

static OWNED: Mutex<Owned> = Mutex::new(Owned {
    claims: Vec::new(),
    free: 0..0,
});

/// Returns a port of 127.0.0.1 that is free and is not given to any other test.
pub fn free_port() -> u16 {
    let mut owned = OWNED
        .lock()
        .expect("no thread has panicked while holding the lock");
    loop {
        let Some(port) = owned.free.next() else {
            let (claim, free) = claim_block();
            owned.claims.push(claim);
            owned.free = free;
            continue;
        };
        // An unrelated program may already listen on a port of the reserved block.
        if bind(port).is_some() {
            return port;
        }
    }
}

fn claim_block() -> (TcpListener, Range<u16>) {
    let count = BLOCKS.end - BLOCKS.start;
    let first =
        u16::try_from(process::id() % u32::from(count)).expect("a remainder modulo a u16 fits into a u16");
    for turn in 0..count {
        let start = (BLOCKS.start + (first + turn) % count) * BLOCK_SIZE;
        if let Some(claim) = bind(start) {
            return (claim, start + 1..start + BLOCK_SIZE);
        }
    }
    panic!(
        "all port blocks from {} to {} are in use; is another test run stuck?",
        BLOCKS.start * BLOCK_SIZE,
        BLOCKS.end * BLOCK_SIZE
    )
}

fn bind(port: u16) -> Option<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_ports_are_distinct_and_unused() {
        let first = free_port();
        let foreign = bind(first + 1);
        let second = free_port();
        assert!(second > first);
        assert!(foreign.is_none() || second != first + 1);
        assert!(bind(second).is_some());
    }

    #[test]
    fn another_port_block_is_reserved_when_one_is_used_up() {
        let ports: std::collections::HashSet<_> = (0..BLOCK_SIZE * 2).map(|_| free_port()).collect();
        assert_eq!(ports.len(), usize::from(BLOCK_SIZE * 2));
    }
}
