/* SPDX-License-Identifier: Apache-2.0 */
/* What the policy of this process says of one connection. */
#include "link/link.h"

bool km_permit(const struct km_file *f, const struct km_address *local,
	       const struct km_address *peer, const struct km_address *to,
	       const struct km_address *via, const uint32_t *uid, bool *names_uid)
{
	struct km_policy_query query = {.connector = f->role == KM_ROLE_CONNECTOR,
					.via_known = via != NULL,
					.uid_known = uid != NULL};
	struct km_policy_decision decision;

	if (km_likely(!km_proc.policy))
		return true;
	query.local = *local;
	query.peer = *peer;
	query.to = *to;
	if (via) {
		query.via = *via;
		query.redirected = !km_same_address(via, to);
	}
	if (uid)
		query.uid = *uid;
	decision = km_policy_decide(km_proc.policy, &query);
	if (names_uid)
		*names_uid = decision.names_uid;
	if (decision.answer != KM_POLICY_DENY)
		return true;
	if (decision.line)
		km_log(KM_LOG_INFO,
		       "fd %d: line %u of KMAP_POLICY keeps it on the kernel", f->fd,
		       decision.line);
	else
		km_log(KM_LOG_INFO, "fd %d: no rule of KMAP_POLICY allows it a ring",
		       f->fd);
	return false;
}
