//! Which servers share an endpoint, and what follows from it.

use std::fmt;
use std::net::IpAddr;

use super::resource::parse_resource;
use super::{Algorithm, Listen, Policy, Server};

/// Where RFC 9728 (section 3.1) puts a resource's metadata: between the resource URI's host and its path.
pub const METADATA_PREFIX: &str = "/.well-known/oauth-protected-resource";

impl Algorithm {
    /// Every algorithm, in the order of the documentation.
    pub const ALL: [Self; 7] =
        [Self::RS256, Self::RS384, Self::RS512, Self::PS256, Self::ES256, Self::ES384, Self::EdDSA];

    /// The name in JOSE headers and policies.
    pub fn name(self) -> &'static str {
        match self {
            Self::RS256 => "RS256",
            Self::RS384 => "RS384",
            Self::RS512 => "RS512",
            Self::PS256 => "PS256",
            Self::ES256 => "ES256",
            Self::ES384 => "ES384",
            Self::EdDSA => "EdDSA",
        }
    }
}

impl Listen {
    /// Some connection arrives on both: the ports are equal, and so are the addresses, or one covers the other.
    /// `[::]` covers both families, `0.0.0.0` every IPv4 address.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.port == other.port && (self.covers(other.addr) || other.covers(self.addr))
    }

    fn covers(&self, addr: IpAddr) -> bool {
        match self.addr {
            IpAddr::V6(own) if own.is_unspecified() => true,
            IpAddr::V4(own) if own.is_unspecified() => addr.is_ipv4(),
            own => own == addr,
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::net::SocketAddr::new(self.addr, self.port).fmt(f)
    }
}

impl Server {
    /// Path of the resource's metadata (RFC 9728, section 3.1): the well-known prefix, then the resource URI's path.
    pub fn metadata_path(&self) -> String {
        let path = parse_resource(&self.resource).map(|parts| parts.path).unwrap_or_default();
        format!("{METADATA_PREFIX}{path}")
    }
}

impl Policy {
    /// The other servers that share an endpoint with `server`, in file order.
    pub fn sharing(&self, server: &Server) -> Vec<&Server> {
        let shares =
            |other: &Server| server.listen.iter().any(|a| other.listen.iter().any(|b| a.overlaps(b)));
        self.servers.iter().map(AsRef::as_ref).filter(|s| s.name != server.name && shares(s)).collect()
    }

    /// Whether `server`'s metadata also stands at the bare well-known path: only where no other server shares an
    /// endpoint with it, since the bare path could not say whose metadata it is.
    pub fn root_metadata(&self, server: &Server) -> bool {
        self.sharing(server).is_empty()
    }
}
