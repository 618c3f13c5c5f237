"""`edgekit doctor --chaos`: breaks things on the device on purpose, and sees whether what edgekit promises still holds.

    case.py       what a case is: what is done, what must hold; its rounds, its figures
    cases.py      the table of all cases
    run.py        runs them, each in a process of its own, in a fresh folder, with an end in time
    child.py      that process
    report.py     the report: JSON, signed; and the same as a page
    stage.py      what cases stand on: scans as processes, a receiver, bundles and packs of them
    killed.py     kill -9 of scans and of writers; a power cut by SQLite's own write log (write_log.py)
    network.py    receivers that are down, flap, keep silent; a full disk
    cameras.py    cameras that hang, go, crawl or send damage; the clock; a model that hangs
    updates.py    install and rollback, killed anywhere; a full disk; a bundle that answers otherwise; damage in a slot
    packs.py      packs that must be refused

Nothing here touches a scan that runs, a root that is in use or the system's clock.
"""

from .report import check_report, is_report, write_report
from .run import list_cases, run_cases

__all__ = ["check_report", "is_report", "list_cases", "run_cases", "write_report"]
