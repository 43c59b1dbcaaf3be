"""The compiler passes, one file each; installed and imported as `saq_fx.passes`."""
