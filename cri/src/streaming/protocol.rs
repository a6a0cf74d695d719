//! Which of the subprotocols that a client offers is spoken.

/// Versions of the remote command protocol, `vN.channel.k8s.io`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// Text on the error stream.
    V1,
    /// As v1.
    V2,
    /// With sizes of the terminal.
    V3,
    /// With a status in JSON on the error stream.
    V4,
    /// With the end of single streams; over WebSocket only.
    V5,
}

impl Version {
    /// Whether there is a stream for sizes of the terminal.
    pub fn resizes(self) -> bool {
        self >= Self::V3
    }

    /// Whether the error stream carries JSON.
    pub fn has_status(self) -> bool {
        self >= Self::V4
    }
}

/// The remote command protocols over SPDY.
pub const COMMAND_OVER_SPDY: &[(&str, Version)] = &[
    ("v4.channel.k8s.io", Version::V4),
    ("v3.channel.k8s.io", Version::V3),
    ("v2.channel.k8s.io", Version::V2),
    ("channel.k8s.io", Version::V1),
];
/// The remote command protocols over WebSocket.
pub const COMMAND_OVER_WEBSOCKET: &[(&str, Version)] =
    &[("v5.channel.k8s.io", Version::V5), ("v4.channel.k8s.io", Version::V4)];
/// Forwarding of ports over SPDY inside a WebSocket.
pub const PORT_FORWARD_OVER_WEBSOCKET: &[(&str, ())] = &[("SPDY/3.1+portforward.k8s.io", ())];
/// Forwarding of ports over SPDY.
pub const PORT_FORWARD_OVER_SPDY: &[(&str, ())] = &[("portforward.k8s.io", ())];

/// The first of the client's that the server knows; `offered` may have several in one header, after commas.
pub fn choose<'a, V: Copy>(
    offered: impl Iterator<Item = &'a str>,
    known: &'static [(&'static str, V)],
) -> Option<(&'static str, V)> {
    let mut offered = offered.flat_map(|header| header.split(',')).map(str::trim);
    offered.find_map(|name| known.iter().find(|(known, _)| *known == name).copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_first_choice_that_is_known_is_spoken() {
        let choose = |offered: &[&'static str]| choose(offered.iter().copied(), COMMAND_OVER_SPDY);
        assert_eq!(choose(&["v9.channel.k8s.io", "v4.channel.k8s.io"]), Some(COMMAND_OVER_SPDY[0]));
        assert_eq!(
            choose(&["v5.channel.k8s.io, v3.channel.k8s.io,channel.k8s.io"]),
            Some(COMMAND_OVER_SPDY[1])
        );
        assert_eq!(choose(&["nonsense", ""]), None);
        assert_eq!(choose(&[]), None);
    }
}
