//! Limits password checks per source address, whatever the user name.
//!
//! An IPv6 host may use any address of its /64 network (RFC 4291, section 2.5.1), and a site usually has a /48 network,
//! which contains 65,536 /64 networks. Therefore both the /64 and the /48 network of an address have a token bucket.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::rate::{Bucket, nanoseconds};

/// Maximum number of token buckets; they take about 4 MiB.
const MAX_BUCKETS: usize = 65_536;
/// Factor by which a /48 network may exceed the login limit of a /64 network.
const SITE: u32 = 8;

/// An IP network: its first address and its prefix length. IPv4 addresses are mapped to IPv6.
type Network = (Ipv6Addr, u32);

/// Limits of logins per source address.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SourceSettings {
    /// Maximum number of logins in a burst.
    pub(crate) burst: u32,
    /// Interval between further logins after the burst.
    pub(crate) interval: Duration,
}

/// Token buckets of the networks that attempted logins recently.
#[derive(Debug)]
pub(crate) struct Sources {
    began: Instant,
    host: Bucket,
    site: Bucket,
    /// For each network, the time at which its token bucket will be full again, in nanoseconds since `began`. A network
    /// without an entry has a full bucket.
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

    /// Takes a rate-limit token for one login from the source address, or returns how long to wait for the next token.
    pub(crate) fn take(&self, source: IpAddr) -> Result<(), Duration> {
        self.take_at(source, nanoseconds(self.began.elapsed()))
    }

    fn take_at(&self, source: IpAddr, now: u64) -> Result<(), Duration> {
        let (host, site) = networks(source);
        let mut full_at = self.full_at.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |network| full_at.get(&network).copied().unwrap_or(0);
        // Check both token buckets before taking from either, so that a refused login costs no token.
        let next_of_host = self.host.take(of(host), now)?;
        let next_of_site = site.map(|site| self.site.take(of(site), now).map(|next| (site, next)));
        let next_of_site = next_of_site.transpose()?;
        if full_at.len() >= MAX_BUCKETS {
            forget(&mut full_at, now);
        }
        full_at.extend(next_of_site);
        full_at.insert(host, next_of_host);
        Ok(())
    }
}

/// Returns the network of a host and, for IPv6, also the network of its site.
fn networks(source: IpAddr) -> (Network, Option<Network>) {
    match source {
        IpAddr::V4(address) => ((address.to_ipv6_mapped(), 128), None),
        IpAddr::V6(address) => {
            let first = |bits: u32| Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << (128 - bits)));
            ((first(64), 64), Some((first(48), 48)))
        }
    }
}

/// Makes room in the table: removes token buckets that are full again, and then, if needed, the fuller half of the
/// rest.
fn forget(full_at: &mut HashMap<Network, u64>, now: u64) {
    full_at.retain(|_, full_at| *full_at > now);
    if full_at.len() < MAX_BUCKETS {
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

    /// Returns how many of `tries` simultaneous login attempts are admitted.
    fn admitted(sources: &Sources, of: impl Fn(u16) -> IpAddr, tries: u16, now: u64) -> usize {
        let tries = (0..tries).filter(|turn| sources.take_at(of(*turn), now).is_ok());
        tries.count()
    }

    #[test]
    fn logins_per_address_are_limited_to_burst_of_20_then_one_per_second() {
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
    fn addresses_of_one_ipv6_64_network_share_a_login_limit() {
        let sources = sources();
        let flood = |turn| Ipv6Addr::new(0x2001, 0xdb8, 1, 2, turn, 4, 5, 6).into();
        assert_eq!(admitted(&sources, flood, 400, 0), 20);
        assert!(sources.take_at(source("2001:db8:1:3::1"), 0).is_ok());
    }

    #[test]
    fn ipv6_48_network_gets_eight_times_the_login_limit() {
        let sources = sources();
        let flood = |turn| Ipv6Addr::new(0x2001, 0xdb8, 1, turn, 3, 4, 5, 6).into();
        assert_eq!(admitted(&sources, flood, 1000, 0), 160);
        assert_eq!(admitted(&sources, flood, 1000, SECOND), 8);
        assert!(sources.take_at(source("2001:db8:2::1"), 0).is_ok());
    }

    #[test]
    fn full_table_drops_the_sources_with_the_fewest_recent_logins() {
        let sources = sources();
        let attacker = source("192.0.2.1");
        assert_eq!(admitted(&sources, |_| attacker, 400, 0), 20);
        for number in 0..200_000_u32 {
            let other = Ipv4Addr::from(0x0a00_0000 + number).into();
            sources.take_at(other, 0).unwrap();
        }
        assert!(sources.full_at.lock().unwrap().len() <= MAX_BUCKETS);
        assert!(
            sources.take_at(attacker, 0).is_err(),
            "the address with the emptiest token bucket must stay in the table"
        );
    }
}
