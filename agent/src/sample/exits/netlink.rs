//! The netlink socket on which the kernel sends a record of each thread that ends.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind,
        netlink::{GENERIC, SocketAddrNetlink},
        recv, send, socket_with,
        sockopt::{Timeout, set_socket_recv_buffer_size_force, set_socket_timeout},
    },
};

use super::taskstats::{NLMSG_ERROR, Record, RecordError, attribute, messages, push_attribute};

/// Size of the kernel's buffer of records. A record takes about 2.3 KiB of it, so it holds those of some 7,000 threads
/// while the agent does not run.
const BUFFER_BYTES: usize = 16 << 20;
/// Maximum size of a message; a record has less than 2 KiB.
const MESSAGE_BYTES: usize = 16_384;
/// Maximum time in which the kernel answers a request, and in which the record of a thread of the agent arrives.
const PATIENCE: Duration = Duration::from_secs(2);

// The generic netlink family that knows the others, its command and attributes (`linux/genetlink.h`).
const CONTROLLER: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
// The command and the attribute of the taskstats family that register a listener.
const GET: u8 = 1;
const REGISTER_CPUS: u16 = 3;
/// Flags of a request that the kernel must acknowledge.
const REQUEST_ACK: u16 = 1 | 4;
const REQUEST: u16 = 1;

/// Why the kernel does not report ended processes to the agent.
#[derive(Debug, thiserror::Error)]
pub(in crate::sample) enum Unavailable {
    /// A system call failed.
    #[error("{0} failed")]
    Call(&'static str, #[source] io::Error),
    /// The kernel has no taskstats interface (`CONFIG_TASKSTATS`).
    #[error("the kernel has no taskstats interface")]
    NoFamily,
    /// The kernel does not report to this process.
    #[error(
        "the kernel refused to report processes that end; run the agent with CAP_NET_ADMIN in the initial pid and user namespaces"
    )]
    Refused(#[source] io::Error),
    /// Nothing arrived.
    #[error(
        "the kernel sent no record of a process that ended; run the agent in the initial network namespace"
    )]
    Silent,
    /// The records have another format.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// A socket that receives the records of all threads that end.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    family: u16,
}

/// A buffer for a received message.
#[derive(Debug)]
pub(super) struct Buffer(Box<[u8]>);

impl Buffer {
    pub(super) fn new() -> Self {
        Self(vec![0; MESSAGE_BYTES].into())
    }
}

/// What was received.
#[derive(Debug)]
pub(super) enum Received {
    Record(Result<Record, RecordError>),
    /// The kernel dropped records, because the agent did not receive them in time.
    Lost,
    /// Nothing within the time limit, or a message of another kind.
    Nothing,
}

impl Socket {
    /// Registers for the records of all CPUs, and checks that they arrive.
    pub(super) fn open() -> Result<Self, Unavailable> {
        let call = |name| move |error: Errno| Unavailable::Call(name, error.into());
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(GENERIC),
        );
        let socket = socket.map_err(call("socket"))?;
        bind(&socket, &SocketAddrNetlink::new(0, 0)).map_err(call("bind"))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE / 2)).map_err(call("setsockopt"))?;
        let mut socket = Self {
            fd: socket,
            family: 0,
        };
        let mut buffer = Buffer::new();
        socket.family = socket.find_family(&mut buffer)?;
        // Only processes with CAP_NET_ADMIN may have such a large buffer; the others are refused anyway.
        set_socket_recv_buffer_size_force(&socket.fd, BUFFER_BYTES)
            .map_err(|error| Unavailable::Refused(error.into()))?;
        socket.register(&mut buffer)?;
        socket.check(&mut buffer)?;
        Ok(socket)
    }

    fn find_family(&self, buffer: &mut Buffer) -> Result<u16, Unavailable> {
        self.request(CONTROLLER, GET_FAMILY, REQUEST, FAMILY_NAME, b"TASKSTATS\0")?;
        let (kind, message) = self.answer(buffer)?;
        let id = attribute(message, FAMILY_ID).and_then(<[u8]>::first_chunk);
        match id {
            Some(id) if kind != NLMSG_ERROR => Ok(u16::from_ne_bytes(*id)),
            _ => Err(Unavailable::NoFamily),
        }
    }

    fn register(&self, buffer: &mut Buffer) -> Result<(), Unavailable> {
        let possible = fs::read_to_string(Path::new("/sys/devices/system/cpu/possible"));
        let possible = possible.map_err(|error| Unavailable::Call("reading the list of CPUs", error))?;
        let cpus = [possible.trim().as_bytes(), b"\0"].concat();
        self.request(self.family, GET, REQUEST_ACK, REGISTER_CPUS, &cpus)?;
        loop {
            let (kind, message) = self.answer(buffer)?;
            // Records may arrive before the acknowledgement.
            if kind == NLMSG_ERROR {
                let code = message.get(16..).and_then(<[u8]>::first_chunk);
                return match code.copied().map_or(0, i32::from_ne_bytes) {
                    0 => Ok(()),
                    code => Err(Unavailable::Refused(io::Error::from_raw_os_error(-code))),
                };
            }
        }
    }

    /// In a network namespace of its own, a process may register but receives nothing. A thread of the agent that ends
    /// shows whether records arrive.
    fn check(&self, buffer: &mut Buffer) -> Result<(), Unavailable> {
        let ended = std::thread::spawn(|| ()).join();
        drop(ended);
        let own = std::process::id();
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            match self.wait(buffer) {
                Ok(Received::Record(record))
                    if record.as_ref().map_or(true, |found| found.process == own) =>
                {
                    record?;
                    return Ok(());
                }
                Ok(_) => {}
                Err(error) => return Err(Unavailable::Call("recv", error)),
            }
        }
        Err(Unavailable::Silent)
    }

    fn request(
        &self,
        family: u16,
        command: u8,
        flags: u16,
        attribute: u16,
        content: &[u8],
    ) -> Result<(), Unavailable> {
        let mut message = vec![0; 4];
        message.extend_from_slice(&family.to_ne_bytes());
        message.extend_from_slice(&flags.to_ne_bytes());
        // Sequence number, port, and the generic netlink header with version 1.
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(&[command, 1, 0, 0]);
        push_attribute(&mut message, attribute, content);
        let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
        if let Some(place) = message.first_chunk_mut() {
            *place = length.to_ne_bytes();
        }
        let sent = send(&self.fd, &message, SendFlags::empty());
        sent.map_err(|error| Unavailable::Call("send", error.into()))?;
        Ok(())
    }

    /// Receives the first message of the answer to a request.
    fn answer<'a>(&self, buffer: &'a mut Buffer) -> Result<(u16, &'a [u8]), Unavailable> {
        let received = recv(&self.fd, &mut *buffer.0, RecvFlags::empty());
        let (_, length) = received.map_err(|error| Unavailable::Call("recv", error.into()))?;
        let bytes = buffer.0.get(..length).unwrap_or_default();
        messages(bytes).next().ok_or(Unavailable::NoFamily)
    }

    /// Receives a record; if there is none, waits at most a second for one.
    pub(super) fn wait(&self, buffer: &mut Buffer) -> io::Result<Received> {
        self.receive_with(buffer, RecvFlags::empty())
    }

    /// Receives a record, if there is one.
    pub(super) fn receive(&self, buffer: &mut Buffer) -> io::Result<Received> {
        self.receive_with(buffer, RecvFlags::DONTWAIT)
    }

    fn receive_with(&self, buffer: &mut Buffer, flags: RecvFlags) -> io::Result<Received> {
        let length = match recv(&self.fd, &mut *buffer.0, flags) {
            Ok((_, length)) => length,
            Err(Errno::NOBUFS) => return Ok(Received::Lost),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Nothing),
            Err(error) => return Err(error.into()),
        };
        let bytes = buffer.0.get(..length).unwrap_or_default();
        // The kernel sends each record in a datagram of its own.
        let record = messages(bytes).find(|(kind, _)| *kind == self.family);
        Ok(record.map_or(Received::Nothing, |(_, message)| {
            Received::Record(Record::parse(message))
        }))
    }
}
