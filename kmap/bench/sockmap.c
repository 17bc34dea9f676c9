/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The eBPF way around the stack, for comparison: what one end of a TCP connection sends
 * goes straight into the receive queue of the other.  sockmap.py compiles and loads it.
 *
 * Written from the kernel's documentation: Documentation/bpf/map_sockmap.rst and
 * bpf-helpers(7).
 */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define ADDRESS_FAMILY_INET 2

/* An end of a connection; addresses in network order, ports in host order. */
struct end {
	__u32 local_address, peer_address, local_port, peer_port;
};

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 65536);
	__type(key, struct end);
	__type(value, __u64);
} sockets SEC(".maps");

SEC("sockops")
int establish(struct bpf_sock_ops *event)
{
	struct end end = {
		.local_address = event->local_ip4,
		.peer_address = event->remote_ip4,
		.local_port = event->local_port,
		.peer_port = bpf_ntohl(event->remote_port),
	};

	if (event->family == ADDRESS_FAMILY_INET &&
	    (event->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB ||
	     event->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB))
		bpf_sock_hash_update(event, &sockets, &end, BPF_NOEXIST);
	return 0;
}

SEC("sk_msg")
int redirect(struct sk_msg_md *message)
{
	struct end peer = {
		.local_address = message->remote_ip4,
		.peer_address = message->local_ip4,
		.local_port = bpf_ntohl(message->remote_port),
		.peer_port = message->local_port,
	};

	return (int)bpf_msg_redirect_hash(message, &sockets, &peer, BPF_F_INGRESS);
}

char licence[] SEC("license") = "GPL";
