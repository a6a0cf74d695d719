//! Exec, Attach and PortForward: an HTTP server of hull's own, whose URLs work once.
//!
//! An RPC checks what is asked for, keeps it under a token ([`token`]) and answers with a URL. kubelet (for kubectl) or
//! crictl connects to it and upgrades the connection: to [`spdy`] or to a WebSocket. What then passes is a remote
//! command ([`command`]: exec and attach) or forwarded connections ([`port_forward`]).
//!
//! Every task of a session ends with its connection, and a command whose client has gone is ended too. Memory is
//! bounded: what one side does not take, the other side is not asked for.

pub mod attach;
pub mod command;
pub mod dial;
pub mod exec;
pub mod pinned;
pub mod pipes;
pub mod port_forward;
pub mod protocol;
pub mod serve;
pub mod session;
pub mod spdy;
pub mod status;
pub mod terminal_size;
pub mod tls;
pub mod token;
mod waiting;
pub mod websocket;

pub use attach::AttachSession;
pub use command::Wanted;
pub use exec::ExecSession;
pub use port_forward::PortForwardSession;
pub use serve::{Streaming, StreamingError};
pub use session::Session;
pub use token::TokenError;
