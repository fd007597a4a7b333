//! Free ports that stay free. Asking the kernel for "any port" and binding it later is a race, and a restarted
//! server wants the port it had. So each test process owns a block of ports for its life: it holds the block's first
//! port, and hands out the others. The blocks lie below the kernel's range for outgoing connections, which would
//! take ports at random, and beside the ports of a running stack.

use std::{
    net::{Ipv4Addr, TcpListener},
    ops::Range,
    process,
    sync::Mutex,
};

/// Above 20,000, where few servers live, and below MongoDB's 27,017.
const BLOCKS: Range<u16> = 200..269;
const BLOCK_SIZE: u16 = 100;

/// The ports of this process.
struct Owned {
    /// Holding a block's first port is what makes the block ours.
    claims: Vec<TcpListener>,
    /// What is left of the newest block.
    free: Range<u16>,
}

static OWNED: Mutex<Owned> = Mutex::new(Owned {
    claims: Vec::new(),
    free: 0..0,
});

/// A port of 127.0.0.1 that nobody listens on and that no other test will be given.
pub fn free_port() -> u16 {
    let mut owned = OWNED.lock().expect("no test panics while it takes a port");
    loop {
        let Some(port) = owned.free.next() else {
            let (claim, free) = claim_block();
            owned.claims.push(claim);
            owned.free = free;
            continue;
        };
        // A program that is no test of ours may listen within the block.
        if bind(port).is_some() {
            return port;
        }
    }
}

fn claim_block() -> (TcpListener, Range<u16>) {
    let count = BLOCKS.end - BLOCKS.start;
    let first = u16::try_from(process::id() % u32::from(count)).expect("a remainder of a u16");
    for turn in 0..count {
        let start = (BLOCKS.start + (first + turn) % count) * BLOCK_SIZE;
        if let Some(claim) = bind(start) {
            return (claim, start + 1..start + BLOCK_SIZE);
        }
    }
    panic!(
        "all ports from {} to {} are in use: is another run of the tests stuck?",
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
    fn no_port_is_given_twice_and_none_that_is_in_use() {
        let first = free_port();
        let foreign = bind(first + 1);
        let second = free_port();
        assert!(second > first);
        assert!(foreign.is_none() || second != first + 1);
        assert!(bind(second).is_some());
    }

    #[test]
    fn a_used_up_block_is_followed_by_another() {
        let ports: std::collections::HashSet<_> = (0..BLOCK_SIZE * 2).map(|_| free_port()).collect();
        assert_eq!(ports.len(), usize::from(BLOCK_SIZE * 2));
    }
}
