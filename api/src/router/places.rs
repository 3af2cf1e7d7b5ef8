// SPDX-License-Identifier: Apache-2.0

//! Places for connections, divided among their sources.
//!
//! A connection over TCP is a stranger until one of its requests has a token. Strangers have few places and little time, so
//! that they cannot keep out clients with a token: one stranger too many displaces the oldest of its source, or of the
//! source that has most.
//! The Unix socket knows the user of a connection at once: each user has a share, and the agent's own user a reserve.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

/// The origin of a connection or of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A user of this host, by id; None if the kernel does not name the user.
    User(Option<u32>),
    /// An address.
    Address(IpAddr),
}

impl Source {
    /// The owner of one share: a user, an IPv4 address, or the /64 of an IPv6 address, of which one host has all.
    #[must_use]
    pub fn share(self) -> Source {
        match self {
            Source::User(_) => self,
            Source::Address(ip) => Source::Address(match ip.to_canonical() {
                IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX))),
                ip @ IpAddr::V4(_) => ip,
            }),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::User(Some(uid)) => write!(f, "uid {uid}"),
            Source::User(None) => f.write_str("an unknown user"),
            Source::Address(ip) => ip.to_canonical().fmt(f),
        }
    }
}

/// Bounds of [`Places`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Places of all sources together.
    pub(super) all: usize,
    /// Places of one source.
    pub(super) each: usize,
    /// Whether one connection too many displaces another one, instead of being refused.
    pub(super) displace: bool,
}

/// The places of a listener. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct Places {
    bounds: Bounds,
    held: Arc<Mutex<Held>>,
}

/// Connections by source, the oldest first.
#[derive(Debug, Default)]
struct Held {
    next: u64,
    total: usize,
    of: HashMap<Source, VecDeque<(u64, watch::Sender<bool>)>>,
}

impl Held {
    /// Removes a connection of a source: the one with this number, or the oldest.
    fn forget(&mut self, source: Source, number: Option<u64>) -> Option<watch::Sender<bool>> {
        let own = self.of.get_mut(&source)?;
        let at = number.map_or(Some(0), |number| own.iter().position(|(known, _)| *known == number))?;
        let (_, displaced) = own.remove(at)?;
        if own.is_empty() {
            self.of.remove(&source);
        }
        self.total -= 1;
        Some(displaced)
    }
}

impl Places {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self { bounds, held: Arc::default() }
    }

    /// Takes a place for a connection of this source. If this source or all sources have none left, displaces another
    /// connection, or returns None without `displace`.
    pub(super) fn take(&self, source: Source) -> Option<Place> {
        let source = source.share();
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let has_all = held.of.get(&source).is_some_and(|own| own.len() >= self.bounds.each);
        if has_all || held.total >= self.bounds.all {
            if !self.bounds.displace {
                return None;
            }
            // A client with a token needs its place for a moment only, and gets it even beside silent ones.
            let largest = held.of.iter().max_by_key(|(_, own)| own.len()).map(|(source, _)| *source);
            held.forget(if has_all { source } else { largest? }, None)?.send_replace(true);
        }
        let (displace, displaced) = watch::channel(false);
        let number = held.next;
        held.next += 1;
        held.total += 1;
        held.of.entry(source).or_default().push_back((number, displace));
        Some(Place { places: self.clone(), source, number, displaced })
    }
}

/// A place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Places,
    source: Source,
    number: u64,
    displaced: watch::Receiver<bool>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.places.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.forget(self.source, Some(self.number));
    }
}

/// A connection over TCP, a stranger until its first request with a token.
#[derive(Clone, Debug)]
pub(super) struct Newcomer(Arc<(Mutex<Option<Place>>, watch::Sender<bool>)>);

impl Newcomer {
    pub(super) fn new(place: Place) -> Self {
        Newcomer(Arc::new((Mutex::new(Some(place)), watch::Sender::new(false))))
    }

    /// Ends the connection's time as a stranger, after a request with a token: its place is free for another one.
    pub(super) fn admitted(&self) {
        let (place, admitted) = &*self.0;
        drop(place.lock().unwrap_or_else(PoisonError::into_inner).take());
        admitted.send_replace(true);
    }

    /// Completes when a stranger must go: displaced, or without a token for this time. Never completes for an admitted
    /// connection.
    pub(super) async fn overstays(self, patience: Duration) {
        let until = Instant::now() + patience;
        let (place, admitted) = &*self.0;
        let place = place
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(|place| place.displaced.clone());
        let mut admitted = admitted.subscribe();
        let admission = async {
            timeout_at(until, admitted.wait_for(|admitted| *admitted)).await.is_ok_and(|seen| seen.is_ok())
        };
        let displaced = async {
            // An admission has released the place: nothing can displace this connection.
            match place {
                Some(mut place) => place.wait_for(|displaced| *displaced).await.is_ok(),
                None => false,
            }
        };
        let stays = tokio::select! {
            biased;
            admitted = admission => admitted,
            displaced = displaced => !displaced,
        };
        if stays {
            std::future::pending().await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Source {
        Source::Address(text.parse().unwrap())
    }

    #[test]
    fn one_source_has_its_share_and_no_more() {
        let places = Places::new(Bounds { all: 5, each: 3, displace: false });
        let users = [1000, 1001].map(|uid| Source::User(Some(uid)));
        let mut held: Vec<_> = (0..4).filter_map(|_| places.take(users[0])).collect();
        assert_eq!(held.len(), 3);
        held.extend((0..4).filter_map(|_| places.take(users[1])));
        assert_eq!(held.len(), 5, "the bound of all");
        assert!(held.iter().all(|place| !*place.displaced.borrow()), "users keep their places");
        held.clear();
        assert!(places.held.lock().unwrap().of.is_empty(), "nothing stays of a source that has gone");
        assert_eq!((0..9).filter_map(|_| places.take(users[0])).map(std::mem::forget).count(), 3);
    }

    #[test]
    fn one_stranger_too_many_displaces_the_oldest_of_its_source_or_of_the_largest() {
        let places = Places::new(Bounds { all: 4, each: 3, displace: true });
        let large: Vec<_> = (0..3).map(|_| places.take(address("192.0.2.1")).unwrap()).collect();
        let small = places.take(address("192.0.2.2")).unwrap();
        let fresh = places.take(address("192.0.2.3")).unwrap();
        let displaced: Vec<_> =
            large.iter().chain([&small, &fresh]).map(|place| *place.displaced.borrow()).collect();
        assert_eq!(displaced, [true, false, false, false, false]);
        let second = places.take(address("192.0.2.1")).unwrap();
        let third = places.take(address("192.0.2.1")).unwrap();
        assert!(*large[1].displaced.borrow() && !*small.displaced.borrow(), "the largest pays again");
        let displaced = |place: &Place| *place.displaced.borrow();
        assert!(!displaced(&second) && !displaced(&third));
        drop((large, second, third));
        assert_eq!(places.held.lock().unwrap().total, 2, "a displaced place is not given back twice");
    }

    #[test]
    fn a_network_of_one_host_is_one_source() {
        for (one, other, same) in [
            ("2001:db8::1", "2001:db8::ffff:1", true),
            ("2001:db8::1", "2001:db8:0:1::1", false),
            ("192.0.2.1", "::ffff:192.0.2.1", true),
            ("192.0.2.1", "192.0.2.2", false),
        ] {
            assert_eq!(address(one).share() == address(other).share(), same, "{one} {other}");
        }
        assert_eq!(address("::ffff:192.0.2.1").to_string(), "192.0.2.1");
    }
}
