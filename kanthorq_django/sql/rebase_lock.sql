-- Wait for every open publisher, and let none begin before the rebase has ended: no event may
-- carry a transaction id that the new cursors do not know.
LOCK TABLE kanthorq_django_event IN SHARE ROW EXCLUSIVE MODE
