"""Pictures and numbers about models; the command lines over it are in tools/analysis_tools."""
