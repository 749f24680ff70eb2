"""The run directory: its files on a filesystem or in an object store, and the records that they hold."""
