//! Offsets of kernel fields, from the kernel's own type information.

use btf_rs::{Btf, Type};

/// Where the running kernel describes its types.
const VMLINUX_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Offsets in `struct tcp_sock`, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpOffsets {
    /// `write_seq`: the next byte that the server writes.
    pub write_seq: u32,
    /// `snd_una`: the oldest byte that the client has not acknowledged.
    pub snd_una: u32,
    /// `sk_receive_queue.qlen`: packets that wait behind the one that is being judged.
    pub receive_queue_len: u32,
    /// `rcv_nxt`: the next byte from the client.
    pub rcv_nxt: u32,
    /// `copied_seq`: the next byte that the server reads.
    pub copied_seq: u32,
    /// `sk_rcvbuf`.
    pub receive_buffer: u32,
    /// `sk_rcvlowat`: how many bytes must be there before the server, and the judge, hear of them.
    pub low_water: u32,
    /// `sk_socket` in `struct sock`.
    pub socket: u32,
    /// `file` in `struct socket`.
    pub file: u32,
    /// `f_flags` in `struct file`: whether the server's descriptor is blocking.
    pub file_flags: u32,
    /// `__sk_common.skc_net` in `struct sock`: its network namespace.
    pub net: u32,
    /// `net_cookie` in `struct net`.
    pub net_cookie: u32,
}

/// Why the offsets are not known.
#[derive(Debug, thiserror::Error)]
pub enum OffsetError {
    /// The kernel has no type information, or it can't be read.
    #[error(
        "cannot read the kernel's type information {VMLINUX_BTF}: {0}; a kernel with CONFIG_DEBUG_INFO_BTF is needed"
    )]
    Btf(String),
    /// A field is missing.
    #[error("the kernel's struct {structure} has no 32-bit field `{field}`; this kernel is not supported")]
    NoField {
        /// Of which structure.
        structure: &'static str,
        /// Which.
        field: &'static str,
    },
}

impl TcpOffsets {
    /// Of the running kernel.
    ///
    /// # Errors
    /// See [`OffsetError`].
    pub fn of_running_kernel() -> Result<Self, OffsetError> {
        let btf = Btf::from_file(VMLINUX_BTF).map_err(|error| OffsetError::Btf(error.to_string()))?;
        let offset = |structure: &'static str, field: &'static str| {
            let types = btf
                .resolve_types_by_name(structure)
                .map_err(|error| OffsetError::Btf(format!("struct {structure}: {error}")))?;
            types
                .into_iter()
                .filter_map(|kind| if let Type::Struct(found) = kind { Some(found) } else { None })
                .flat_map(|found| found.members)
                .find(|member| btf.resolve_name(member).is_ok_and(|name| name == field))
                .filter(|member| member.bit_offset() % 32 == 0)
                .map(|member| member.bit_offset() / 8)
                .ok_or(OffsetError::NoField { structure, field })
        };
        Ok(Self {
            write_seq: offset("tcp_sock", "write_seq")?,
            snd_una: offset("tcp_sock", "snd_una")?,
            rcv_nxt: offset("tcp_sock", "rcv_nxt")?,
            copied_seq: offset("tcp_sock", "copied_seq")?,
            receive_buffer: offset("sock", "sk_rcvbuf")?,
            low_water: offset("sock", "sk_rcvlowat")?,
            // A `struct tcp_sock` starts with its `struct sock`.
            socket: offset("sock", "sk_socket")?,
            file: offset("socket", "file")?,
            file_flags: offset("file", "f_flags")?,
            // A `struct sock` starts with its `struct sock_common`.
            net: offset("sock_common", "skc_net")?,
            net_cookie: offset("net", "net_cookie")?,
            receive_queue_len: offset("sock", "sk_receive_queue")? + offset("sk_buff_head", "qlen")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_kernel_has_the_fields() {
        let offsets = TcpOffsets::of_running_kernel().unwrap();
        assert!(offsets.write_seq > 0 && offsets.snd_una > 0 && offsets.write_seq != offsets.snd_una);
    }
}
