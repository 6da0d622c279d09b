"""Token importance in on-policy distillation: which response tokens count. Plugs into opd's patch point."""
