"""The `trl-ssrm` command. TRL takes seconds to import, so it is imported only after a command that needs it was chosen."""
