use std::net::TcpListener;

use super::*;

fn addresses(deny: &[&str], allow: &[&str], listeners: &[&str]) -> Addresses {
    let listeners = listeners
        .iter()
        .map(|text| text.parse::<SmtpServer>().unwrap().into());
    Addresses::new(AddressSettings {
        deny: deny.iter().map(|text| text.parse().unwrap()).collect(),
        allow: allow.iter().map(|text| text.parse().unwrap()).collect(),
        listeners: listeners.collect(),
    })
}

async fn check(addresses: &Addresses, endpoint: &str) -> Result<Vec<SocketAddr>, String> {
    let endpoint = endpoint.parse::<SmtpServer>().unwrap().into();
    addresses
        .check(&endpoint)
        .await
        .map_err(|error| error.to_string())
}

#[tokio::test]
async fn refuses_addresses_of_this_machine_and_its_links() {
    let addresses = addresses(&[], &[], &[]);
    for (endpoint, kind) in [
        ("127.0.0.1:80", "loopback"),
        ("127.8.9.1:80", "loopback"),
        ("localhost:80", "loopback"),
        ("[::1]:80", "loopback"),
        ("[::ffff:127.0.0.1]:80", "loopback"),
        ("[::127.0.0.1]:80", "loopback"),
        ("[64:ff9b::7f00:1]:80", "loopback"),
        ("[2002:7f00:1::]:80", "loopback"),
        ("169.254.169.254:80", "link-local"),
        ("[fe80::1]:80", "link-local"),
        ("[::ffff:169.254.169.254]:80", "link-local"),
        ("224.0.0.1:80", "multicast"),
        ("255.255.255.255:80", "multicast"),
        ("[ff02::1]:80", "multicast"),
        ("0.0.0.0:80", "unspecified"),
        ("0.1.2.3:80", "unspecified"),
        ("[::]:80", "unspecified"),
        // The resolver accepts other spellings of the same addresses.
        ("2130706433:80", "loopback"),
        ("0x7f.1:80", "loopback"),
    ] {
        let refused = check(&addresses, endpoint).await.unwrap_err();
        assert!(refused.contains(kind), "{endpoint}: {refused}");
    }
    for endpoint in [
        "10.1.2.3:80",
        "192.168.1.1:443",
        "172.16.0.1:25",
        "[fd00::1]:80",
        "203.0.113.1:80",
    ] {
        assert!(check(&addresses, endpoint).await.is_ok(), "{endpoint}");
    }
}

#[tokio::test]
async fn deployment_denies_networks_and_allows_single_receivers() {
    let addresses = addresses(
        &["10.0.0.0/8", "fd00::/8"],
        &["127.0.0.1:25", "10.1.1.1:443"],
        &[],
    );
    assert!(check(&addresses, "127.0.0.1:25").await.is_ok());
    assert!(check(&addresses, "[::ffff:127.0.0.1]:25").await.is_ok());
    assert!(check(&addresses, "10.1.1.1:443").await.is_ok());
    for endpoint in [
        "127.0.0.1:26",
        "10.1.1.1:80",
        "10.2.2.2:443",
        "[::ffff:10.2.2.2]:443",
        "[fd12::1]:1",
    ] {
        assert!(check(&addresses, endpoint).await.is_err(), "{endpoint}");
    }
}

#[tokio::test]
async fn listeners_of_the_deployment_cannot_be_allowed() {
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let own = format!("127.0.0.1:{port}");
    let everywhere = format!("0.0.0.0:{port}");
    for listener in [&own, &everywhere, &format!("localhost:{port}")] {
        let addresses = addresses(
            &[],
            &[&own, &format!("[::1]:{port}")],
            &[listener, "10.9.9.9:4222"],
        );
        for endpoint in [
            own.clone(),
            format!("[::ffff:127.0.0.1]:{port}"),
            format!("[::1]:{port}"),
        ] {
            let refused = check(&addresses, &endpoint).await.unwrap_err();
            assert!(
                refused.contains("listens on it"),
                "{listener} {endpoint}: {refused}"
            );
        }
        assert_eq!(addresses.problem(), None);
        assert!(check(&addresses, "10.9.9.9:4222").await.is_err());
        assert!(check(&addresses, "10.9.9.9:4223").await.is_ok());
    }
}

#[tokio::test]
async fn unresolvable_listener_refuses_receivers() {
    let addresses = addresses(&[], &[], &["nats.invalid:4222"]);
    let refused = check(&addresses, "10.1.2.3:80").await.unwrap_err();
    assert!(refused.contains("nats.invalid:4222"), "{refused}");
    assert_eq!(addresses.problem(), Some(refused));
}

#[test]
fn endpoint_of_url_has_the_port_of_its_scheme() {
    for (url, host, port) in [
        ("https://example.com/x", "example.com", 443),
        ("http://example.com", "example.com", 80),
        ("http://[::1]:9093/a?b#c", "::1", 9093),
        ("nats://bus:4222", "bus", 4222),
        ("wss://bus", "bus", 443),
    ] {
        let endpoint = Endpoint::of_uri(&url.parse().unwrap()).unwrap();
        assert_eq!((endpoint.host.as_str(), endpoint.port), (host, port), "{url}");
    }
}
