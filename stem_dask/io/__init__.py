"""Files in and out: lazy readers, the zarr store, exporters. The only places that transpose."""
