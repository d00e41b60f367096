"""The routing rules, a file per family, each rule a pure function of `RoutingInputs` and K."""
