"""What happens to a guest's flows when it moves, from the first word of the migration to the purge.

 1. The destination's hypervisor says that a guest is about to come, and from which host. `DestinationSession` asks that
    one for the guest's flows (`_ask`).
 2. The source has the guest in an outgoing job: `SourceSession` begins to watch the guest's ports, exports them, and
    says what there is (`_start_export`, `_say_offer`). The destination sees what it can take, keeps places for it and
    asks the guest's policy, which may refuse the migration (`_negotiate`). The source sends what has a place, batch by
    batch while the guest runs (`_choose`, `_export_next`).
 3. The destination puts each batch into its firewall as soon as the port's place is known there, looks at what the
    firewall kept, and keeps it from running out of time (`_import`, `_find_scope`, `_verify`, `_renew`).
 4. The source sends what changes, again and again (`_export_changes`, `_resync`).
 5. The guest is paused: the source sends its last changes (`_export_changes`). The destination puts them in, looks
    (`_import`, `_verify`), and says COMPLETE.
 6. The guest runs at the destination, which says ARRIVED.
 7. The source removes by name what it exported and looks whether all is gone (`_purge`); a moment later it removes by
    name what packets of peers have made of the guest's since the pause (`_purge_late`).

When the guest stays, the destination removes by name what it put in (`_discard`), and the source keeps everything.
When a guest left and no destination ever asked, the source notes what it left (`_keep`) and purges that after a while.

When to do which is decided in `migration.source` and `migration.destination`; `session` writes each decision into the
journal, waits for the disk where the decision says so, and calls what stands here: how it is done, in the order above.
Each role stands in a file of its own, `source` and `destination`; what it keeps of a port in `leaving` and `arriving`.
"""

from sami_plugin.handover.destination import DestinationSession
from sami_plugin.handover.source import SourceSession

__all__ = ["DestinationSession", "SourceSession"]
