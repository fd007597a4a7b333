//! Limits how fast one address may ask for passwords to be checked, whatever the user name.
//!
//! An IPv6 host may take any address of its network of 64 bits (RFC 4291, section 2.5.1), and a site usually has one of
//! 48 bits, that is 65,536 of those: both networks have a bucket.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::rate::{Bucket, nanoseconds};

/// Buckets that are kept, some 4 MiB.
const MOST: usize = 65_536;
/// A site of 48 bits may do so many times what one of its networks may.
const SITE: u32 = 8;

/// The first address of a network, and its bits. An IPv4 address is one of IPv6 that is mapped.
type Network = (Ipv6Addr, u32);

/// How many logins of one source are let through.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SourceSettings {
    /// At one moment, after a pause.
    pub(crate) burst: u32,
    /// From then on, one in each interval.
    pub(crate) interval: Duration,
}

/// The buckets of the sources that were seen last.
#[derive(Debug)]
pub(crate) struct Sources {
    began: Instant,
    host: Bucket,
    site: Bucket,
    /// When the bucket of a network is full again, in nanoseconds since the beginning. A full one needs no entry.
    full_at: Mutex<HashMap<Network, u64>>,
}

impl Sources {
    pub(crate) fn new(settings: SourceSettings) -> Self {
        Self {
            began: Instant::now(),
            host: Bucket::new(settings.burst, settings.interval),
            site: Bucket::new(settings.burst.saturating_mul(SITE), settings.interval / SITE),
            full_at: Mutex::default(),
        }
    }

    /// Takes a token of the source, or says how long until there is one.
    pub(crate) fn take(&self, source: IpAddr) -> Result<(), Duration> {
        self.take_at(source, nanoseconds(self.began.elapsed()))
    }

    fn take_at(&self, source: IpAddr, now: u64) -> Result<(), Duration> {
        let (host, site) = networks(source);
        let mut full_at = self.full_at.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |network| full_at.get(&network).copied().unwrap_or(0);
        // Both are asked before either pays: a refusal costs no token.
        let next_of_host = self.host.take(of(host), now)?;
        let next_of_site = site.map(|site| self.site.take(of(site), now).map(|next| (site, next)));
        let next_of_site = next_of_site.transpose()?;
        if full_at.len() >= MOST {
            forget(&mut full_at, now);
        }
        full_at.extend(next_of_site);
        full_at.insert(host, next_of_host);
        Ok(())
    }
}

/// The network that is one host, and the one that is its site.
fn networks(source: IpAddr) -> (Network, Option<Network>) {
    match source {
        IpAddr::V4(address) => ((address.to_ipv6_mapped(), 128), None),
        IpAddr::V6(address) => {
            let first = |bits: u32| Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << (128 - bits)));
            ((first(64), 64), Some((first(48), 48)))
        }
    }
}

/// Makes room: first of the buckets that are full again, then of the half that is nearest to it.
fn forget(full_at: &mut HashMap<Network, u64>, now: u64) {
    full_at.retain(|_, full_at| *full_at > now);
    if full_at.len() < MOST {
        return;
    }
    let mut moments: Vec<u64> = full_at.values().copied().collect();
    let middle = moments.len() / 2;
    let (_, median, _) = moments.select_nth_unstable(middle);
    let median = *median;
    full_at.retain(|_, full_at| *full_at > median);
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn sources() -> Sources {
        Sources::new(SourceSettings {
            burst: 20,
            interval: Duration::from_secs(1),
        })
    }

    fn source(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// How many of so many tries at one moment are let through.
    fn admitted(sources: &Sources, of: impl Fn(u16) -> IpAddr, tries: u16, now: u64) -> usize {
        let tries = (0..tries).filter(|turn| sources.take_at(of(*turn), now).is_ok());
        tries.count()
    }

    #[test]
    fn an_address_has_a_burst_of_20_then_one_each_second() {
        let sources = sources();
        let flood = |_| source("192.0.2.1");
        assert_eq!(admitted(&sources, flood, 400, 0), 20);
        assert_eq!(sources.take_at(flood(0), 0), Err(Duration::from_secs(1)));
        for second in 1..=10 {
            assert_eq!(admitted(&sources, flood, 400, second * SECOND), 1, "{second}");
        }
        assert_eq!(admitted(&sources, |_| source("192.0.2.2"), 400, 10 * SECOND), 20);
    }

    #[test]
    fn the_addresses_of_a_network_of_64_bits_are_one_source() {
        let sources = sources();
        let flood = |turn| Ipv6Addr::new(0x2001, 0xdb8, 1, 2, turn, 4, 5, 6).into();
        assert_eq!(admitted(&sources, flood, 400, 0), 20);
        assert!(sources.take_at(source("2001:db8:1:3::1"), 0).is_ok());
    }

    #[test]
    fn a_site_of_48_bits_may_do_eight_times_as_much() {
        let sources = sources();
        let flood = |turn| Ipv6Addr::new(0x2001, 0xdb8, 1, turn, 3, 4, 5, 6).into();
        assert_eq!(admitted(&sources, flood, 1000, 0), 160);
        assert_eq!(admitted(&sources, flood, 1000, SECOND), 8);
        assert!(sources.take_at(source("2001:db8:2::1"), 0).is_ok());
    }

    #[test]
    fn the_table_is_bounded_and_keeps_the_emptiest_buckets() {
        let sources = sources();
        let attacker = source("192.0.2.1");
        assert_eq!(admitted(&sources, |_| attacker, 400, 0), 20);
        for number in 0..200_000_u32 {
            let other = Ipv4Addr::from(0x0a00_0000 + number).into();
            sources.take_at(other, 0).unwrap();
        }
        assert!(sources.full_at.lock().unwrap().len() <= MOST);
        assert!(
            sources.take_at(attacker, 0).is_err(),
            "the attacker is remembered"
        );
    }
}
