"""The `trl-ssrm` command. Nothing is imported before a command is chosen, since TRL takes seconds to import."""
