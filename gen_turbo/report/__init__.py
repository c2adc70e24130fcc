"""Empty on purpose: tables and plots live in `gen_turbo.bench`, for `gen_turbo.report` is a public function."""
