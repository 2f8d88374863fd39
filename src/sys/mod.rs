//! (module sys)
