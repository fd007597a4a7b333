//! Limits password checks per source address, whatever the user name.
//!
//! An IPv6 host may use any address of its /64 network (RFC 4291, section 2.5.1), and a site usually has a /48, that is
//! 65,536 such networks. Both networks therefore have a token bucket.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::rate::{Bucket, nanoseconds};

/// Maximum number of buckets, about 4 MiB.
const MAX_BUCKETS: usize = 65_536;
/// Factor by which the limits of a /48 site exceed those of a /64 network.
const SITE: u32 = 8;

/// First address and prefix length of a network. IPv4 addresses are mapped to IPv6.
type Network = (Ipv6Addr, u32);

/// Limits of logins per source.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SourceSettings {
    /// Maximum burst.
    pub(crate) burst: u32,
    /// Interval of further logins.
    pub(crate) interval: Duration,
}

/// The token buckets of recent sources.
#[derive(Debug)]
pub(crate) struct Sources {
    began: Instant,
    host: Bucket,
    site: Bucket,
    /// The time at which the bucket of a network is full again, in nanoseconds since `began`. Full buckets need no
    /// entry.
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

    /// Takes a token of the source, or returns the wait until one is available.
    pub(crate) fn take(&self, source: IpAddr) -> Result<(), Duration> {
        self.take_at(source, nanoseconds(self.began.elapsed()))
    }

    fn take_at(&self, source: IpAddr, now: u64) -> Result<(), Duration> {
        let (host, site) = networks(source);
        let mut full_at = self.full_at.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |network| full_at.get(&network).copied().unwrap_or(0);
        // Check both buckets before taking from either, so that a refusal costs no token.
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

/// The network of the host, and that of its site.
fn networks(source: IpAddr) -> (Network, Option<Network>) {
    match source {
        IpAddr::V4(address) => ((address.to_ipv6_mapped(), 128), None),
        IpAddr::V6(address) => {
            let first = |bits: u32| Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << (128 - bits)));
            ((first(64), 64), Some((first(48), 48)))
        }
    }
}

/// Frees space: removes buckets that are full again, and if needed the half that is nearest to being full.
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

    /// The number of admitted attempts at one time.
    fn admitted(sources: &Sources, of: impl Fn(u16) -> IpAddr, tries: u16, now: u64) -> usize {
        let tries = (0..tries).filter(|turn| sources.take_at(of(*turn), now).is_ok());
        tries.count()
    }

    #[test]
    fn admits_burst_of_20_then_one_per_second() {
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
    fn treats_64_bit_network_as_one_source() {
        let sources = sources();
        let flood = |turn| Ipv6Addr::new(0x2001, 0xdb8, 1, 2, turn, 4, 5, 6).into();
        assert_eq!(admitted(&sources, flood, 400, 0), 20);
        assert!(sources.take_at(source("2001:db8:1:3::1"), 0).is_ok());
    }

    #[test]
    fn allows_48_bit_site_eight_times_as_much() {
        let sources = sources();
        let flood = |turn| Ipv6Addr::new(0x2001, 0xdb8, 1, turn, 3, 4, 5, 6).into();
        assert_eq!(admitted(&sources, flood, 1000, 0), 160);
        assert_eq!(admitted(&sources, flood, 1000, SECOND), 8);
        assert!(sources.take_at(source("2001:db8:2::1"), 0).is_ok());
    }

    #[test]
    fn bounds_table_and_keeps_emptiest_buckets() {
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
            "the attacker is remembered"
        );
    }
}
