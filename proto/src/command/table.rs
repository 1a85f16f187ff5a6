//! The command table: one command is one row here, one function named by the row, one test script.
//!
//! A row reads: variant, name, arity, flags, key positions (first, last, step), route, handler, group, since, summary. The two macros hand
//! all their rows to a macro of the crate that expands them, so a row without a handler does not compile there:
//! [`store_commands!`](crate::store_commands) in the store (handlers relative to its `command` module), [`gateway_commands!`](crate::gateway_commands) in the gateway.

use super::spec::{CommandSpec, Flags, Keys, Merge, Route};
use std::sync::OnceLock;

/// Hands the rows that shards execute to `$expand`.
#[macro_export]
macro_rules! store_commands {
    ($expand:ident) => {
        $expand! {
            Get "get" 2 [READONLY FAST] (1 1 1) OneShard string::get "string" "1.0.0" "Returns the value of a key.";
            Set "set" -3 [WRITE DENYOOM] (1 1 1) OneShard string::set "string" "1.0.0" "Sets the value of a key, whatever it held before.";
            Setnx "setnx" 3 [WRITE DENYOOM FAST] (1 1 1) OneShard string::setnx "string" "1.0.0" "Sets the value of a key only if it does not exist.";
            Setex "setex" 4 [WRITE DENYOOM EVENT_TIME] (1 1 1) OneShard string::setex "string" "2.0.0" "Sets the value of a key and its time to live in seconds.";
            Psetex "psetex" 4 [WRITE DENYOOM EVENT_TIME] (1 1 1) OneShard string::psetex "string" "2.6.0" "Sets the value of a key and its time to live in milliseconds.";
            Getset "getset" 3 [WRITE DENYOOM FAST] (1 1 1) OneShard string::getset "string" "1.0.0" "Sets the value of a key and returns the one before.";
            Getdel "getdel" 2 [WRITE FAST] (1 1 1) OneShard string::getdel "string" "6.2.0" "Returns the value of a key and deletes it.";
            Getex "getex" -2 [WRITE FAST] (1 1 1) OneShard string::getex "string" "6.2.0" "Returns the value of a key and changes its expiry.";
            Mget "mget" -2 [READONLY FAST] (1 -1 1) Split(InKeyOrder) string::mget "string" "1.0.0" "Returns the values of several keys; consistent within a shard.";
            Mset "mset" -3 [WRITE DENYOOM] (1 -1 2) Split(AllOk) string::mset "string" "1.0.1" "Sets several keys; atomic within a shard.";
            Msetnx "msetnx" -3 [WRITE DENYOOM] (1 -1 2) OneShard string::msetnx "string" "1.0.1" "Sets several keys of one shard only if none of them exists.";
            Append "append" 3 [WRITE DENYOOM FAST] (1 1 1) OneShard string::append "string" "2.0.0" "Appends to the value of a key.";
            Strlen "strlen" 2 [READONLY FAST] (1 1 1) OneShard string::strlen "string" "2.2.0" "Returns the length of a value.";
            Getrange "getrange" 4 [READONLY] (1 1 1) OneShard string::getrange "string" "2.4.0" "Returns a part of a value.";
            Substr "substr" 4 [READONLY] (1 1 1) OneShard string::getrange "string" "1.0.0" "Returns a part of a value.";
            Setrange "setrange" 4 [WRITE DENYOOM] (1 1 1) OneShard string::setrange "string" "2.2.0" "Overwrites a part of a value.";
            Incr "incr" 2 [WRITE DENYOOM FAST] (1 1 1) OneShard string::incr "string" "1.0.0" "Adds one to the integer in a key.";
            Decr "decr" 2 [WRITE DENYOOM FAST] (1 1 1) OneShard string::decr "string" "1.0.0" "Subtracts one from the integer in a key.";
            Incrby "incrby" 3 [WRITE DENYOOM FAST] (1 1 1) OneShard string::incrby "string" "1.0.0" "Adds to the integer in a key.";
            Decrby "decrby" 3 [WRITE DENYOOM FAST] (1 1 1) OneShard string::decrby "string" "1.0.0" "Subtracts from the integer in a key.";
            Incrbyfloat "incrbyfloat" 3 [WRITE DENYOOM FAST] (1 1 1) OneShard string::incrbyfloat "string" "2.6.0" "Adds to the floating-point number in a key.";
            Lcs "lcs" -3 [READONLY] (1 2 1) OneShard lcs::lcs "string" "7.0.0" "Finds the longest common subsequence of two values of one shard.";

            Del "del" -2 [WRITE EVENT_TIME] (1 -1 1) Split(Sum) generic::del "generic" "1.0.0" "Deletes keys.";
            Unlink "unlink" -2 [WRITE FAST EVENT_TIME] (1 -1 1) Split(Sum) generic::del "generic" "4.0.0" "Deletes keys; as DEL, which never blocks here.";
            Exists "exists" -2 [READONLY FAST] (1 -1 1) Split(Sum) generic::exists "generic" "1.0.0" "Counts how many of the keys exist.";
            Touch "touch" -2 [READONLY FAST] (1 -1 1) Split(Sum) generic::exists "generic" "3.2.1" "Counts how many of the keys exist; access times are not kept.";
            Type "type" 2 [READONLY FAST] (1 1 1) OneShard generic::type_of "generic" "1.0.0" "Returns the type of the value in a key.";
            Expire "expire" -3 [WRITE FAST] (1 1 1) OneShard expiry::expire "generic" "1.0.0" "Sets the time to live of a key in seconds.";
            Pexpire "pexpire" -3 [WRITE FAST] (1 1 1) OneShard expiry::pexpire "generic" "2.6.0" "Sets the time to live of a key in milliseconds.";
            Expireat "expireat" -3 [WRITE FAST] (1 1 1) OneShard expiry::expireat "generic" "1.2.0" "Sets when a key expires, in Unix seconds.";
            Pexpireat "pexpireat" -3 [WRITE FAST] (1 1 1) OneShard expiry::pexpireat "generic" "2.6.0" "Sets when a key expires, in Unix milliseconds.";
            Ttl "ttl" 2 [READONLY FAST] (1 1 1) OneShard expiry::ttl "generic" "1.0.0" "Returns the time to live of a key in seconds.";
            Pttl "pttl" 2 [READONLY FAST] (1 1 1) OneShard expiry::pttl "generic" "2.6.0" "Returns the time to live of a key in milliseconds.";
            Expiretime "expiretime" 2 [READONLY FAST] (1 1 1) OneShard expiry::expiretime "generic" "7.0.0" "Returns when a key expires, in Unix seconds.";
            Pexpiretime "pexpiretime" 2 [READONLY FAST] (1 1 1) OneShard expiry::pexpiretime "generic" "7.0.0" "Returns when a key expires, in Unix milliseconds.";
            Persist "persist" 2 [WRITE FAST EVENT_TIME] (1 1 1) OneShard expiry::persist "generic" "2.2.0" "Takes the expiry off a key.";
            Rename "rename" 3 [WRITE] (1 2 1) OneShard generic::rename "generic" "1.0.0" "Gives a key another name in the same shard.";
            Renamenx "renamenx" 3 [WRITE FAST] (1 2 1) OneShard generic::renamenx "generic" "1.0.0" "Gives a key another name in the same shard if that is free.";
            Copy "copy" -3 [WRITE DENYOOM] (1 2 1) OneShard generic::copy "generic" "6.2.0" "Copies a value to another key of the same shard.";
            ObjectEncoding "object|encoding" 3 [READONLY] (2 2 1) OneShard generic::object_encoding "generic" "2.2.3" "Returns how Redis would keep the value.";
            ObjectRefcount "object|refcount" 3 [READONLY] (2 2 1) OneShard generic::object_refcount "generic" "2.2.3" "Returns 1 for a key that exists.";
            ObjectIdletime "object|idletime" 3 [READONLY] (2 2 1) OneShard generic::object_idletime "generic" "2.2.3" "Returns 0 for a key that exists; access times are not kept.";
            ObjectFreq "object|freq" 3 [READONLY] (2 2 1) OneShard generic::object_freq "generic" "4.0.0" "Answers that no LFU policy is chosen.";
            MemoryUsage "memory|usage" -3 [READONLY] (2 2 1) OneShard generic::memory_usage "server" "4.0.0" "Returns the bytes of a key's row.";

            Dbsize "dbsize" 1 [READONLY FAST WALKS] (0 0 0) AllShards(Sum) keyspace::dbsize "server" "1.0.0" "Counts the keys: exact up to 100,000 a shard, an estimate above.";
            Keys "keys" 2 [READONLY WALKS] (0 0 0) AllShards(Concat) keyspace::keys "generic" "1.0.0" "Returns all keys that match a pattern.";
            Randomkey "randomkey" 1 [READONLY WALKS] (0 0 0) AllShards(AnyNonNull) keyspace::randomkey "generic" "1.0.0" "Returns a random key.";
            Flushdb "flushdb" -1 [WRITE WALKS] (0 0 0) AllShards(AllOk) keyspace::flush "server" "1.0.0" "Deletes all keys of the keyspace.";
            Flushall "flushall" -1 [WRITE WALKS] (0 0 0) AllKeyspaces(AllOk) keyspace::flush "server" "1.0.0" "Deletes all keys of all keyspaces.";

            // Internal. `_scan cursor last-slot count pattern type` walks a shard's slots from the cursor's on; the reply is [next cursor or -1, [key…]].
            // An empty pattern or type means none.
            InternalScan "_scan" 6 [READONLY WALKS INTERNAL] (0 0 0) OneShard keyspace::scan "internal" "0.1.0" "One page of one shard's walk.";
            // `_watch key…` answers an array with one token per key; a token changes whenever what a client sees of the key does.
            InternalWatch "_watch" -2 [READONLY INTERNAL] (1 -1 1) OneShard transaction::watch "internal" "0.1.0" "Tokens of watched keys.";
            // `_exec watched-count (key token)… (command u16 LE, argument count u32 LE, argument…)…` answers an array of replies, or a null
            // array when a token is stale.
            InternalExec "_exec" -2 [WRITE INTERNAL] (0 0 0) OneShard transaction::exec "internal" "0.1.0" "A transaction on one shard.";
            // `_stats [NOKEYS]` answers an array with one map of names and integers; with the word, nothing is walked.
            InternalStats "_stats" -1 [READONLY WALKS INTERNAL] (0 0 0) AllShards(Concat) keyspace::stats "internal" "0.1.0" "Figures of a shard.";

            // A row's place is its code on the wire: what is newer stands below, in the order in which it came.
            Dump "dump" 2 [READONLY] (1 1 1) OneShard dump::dump "generic" "2.6.0" "Returns a value in Redis's own format, with a checksum.";
            Restore "restore" -4 [WRITE DENYOOM] (1 1 1) OneShard dump::restore "generic" "2.6.0" "Makes a key of what DUMP returned; strings only so far.";
            ObjectEventtime "object|eventtime" 3 [READONLY] (2 2 1) OneShard generic::object_eventtime "generic" "0.1.0" "Returns the event time of a key's row, in Unix nanoseconds.";
            // `_save id start|wait` has the whole store of the shard backed up under this name: `start` answers when it has begun, `wait` when it is done.
            InternalSave "_save" 3 [WRITE WALKS INTERNAL] (0 0 0) OneShard backup::save "internal" "0.1.0" "Backs up a store.";
            // `_saves` answers a map of names and integers.
            InternalSaves "_saves" 1 [READONLY INTERNAL] (0 0 0) OneShard backup::saves "internal" "0.1.0" "The backups of a store.";
            // `_compact` rewrites a shard's files and answers OK when it is done.
            InternalCompact "_compact" 1 [READONLY WALKS INTERNAL] (0 0 0) AllShards(AllOk) keyspace::compact "internal" "0.1.0" "Takes back the space of a shard's dead rows.";
            // `_replication` answers an array: role (`primary` or `replica`), epoch and number of the era, sequence number, and an array with
            // one array for each follower: store, connected, in sync, applied up to, lag in microseconds.
            InternalReplication "_replication" 1 [READONLY INTERNAL] (0 0 0) OneShard replication::figures "internal" "0.1.0" "How far the copies of a shard are.";
            // `_verify` compares the shard's copies and answers an array: rows, copies compared, slots that differ in all, and what else there is
            // to say.
            InternalVerify "_verify" 1 [READONLY WALKS INTERNAL] (0 0 0) OneShard replication::verify "internal" "0.1.0" "Compares the copies of a shard.";
        }
    };
}

/// Hands the rows that gateways execute to `$expand`.
#[macro_export]
macro_rules! gateway_commands {
    ($expand:ident) => {
        $expand! {
            Scan "scan" -2 [READONLY] (0 0 0) Here scan::scan "generic" "2.8.0" "Walks the keys page by page; the cursor outlives every change of the topology.";
            Object "object" -2 [CONTAINER] (0 0 0) Here container::missing "generic" "2.2.3" "Commands on how a value is kept.";
            ObjectHelp "object|help" 2 [LOADING STALE] (0 0 0) Here container::object_help "generic" "6.2.0" "Lists the subcommands.";

            Ping "ping" -1 [FAST] (0 0 0) Here connection::ping "connection" "1.0.0" "Answers PONG, or the message.";
            Echo "echo" 2 [LOADING STALE FAST] (0 0 0) Here connection::echo "connection" "1.0.0" "Answers the message.";
            Hello "hello" -1 [NOSCRIPT LOADING STALE FAST NO_AUTH ALLOW_BUSY] (0 0 0) Here connection::hello "connection" "6.0.0" "Chooses the protocol version and says who answers.";
            Select "select" 2 [LOADING STALE FAST] (0 0 0) Here connection::select "connection" "1.0.0" "Chooses the keyspace.";
            Move "move" 3 [WRITE FAST] (1 1 1) Here keyspaces::refuse "generic" "1.0.0" "Refused: databases have shards of their own.";
            Swapdb "swapdb" 3 [WRITE FAST] (0 0 0) Here keyspaces::refuse "server" "4.0.0" "Refused: databases have shards of their own.";
            Readonly "readonly" 1 [LOADING STALE FAST] (0 0 0) Here connection::readonly "connection" "3.0.0" "Lets replicas answer what only reads; they may be behind.";
            Readwrite "readwrite" 1 [LOADING STALE FAST] (0 0 0) Here connection::readwrite "connection" "3.0.0" "Has primaries answer everything again.";
            Quit "quit" -1 [NOSCRIPT LOADING STALE FAST NO_AUTH ALLOW_BUSY] (0 0 0) Here connection::quit "connection" "1.0.0" "Closes the connection.";
            Reset "reset" 1 [NOSCRIPT LOADING STALE FAST NO_AUTH ALLOW_BUSY] (0 0 0) Here connection::reset "connection" "6.2.0" "Sets the connection back to how it began.";
            Auth "auth" -2 [NOSCRIPT LOADING STALE FAST NO_AUTH ALLOW_BUSY] (0 0 0) Here connection::auth "connection" "1.0.0" "Authenticates the connection.";

            Client "client" -2 [CONTAINER] (0 0 0) Here container::missing "connection" "2.4.0" "Commands on client connections.";
            ClientHelp "client|help" 2 [LOADING STALE] (0 0 0) Here container::client_help "connection" "5.0.0" "Lists the subcommands.";
            ClientId "client|id" 2 [NOSCRIPT LOADING STALE] (0 0 0) Here client::id "connection" "5.0.0" "Returns the id of the connection.";
            ClientInfo "client|info" 2 [NOSCRIPT LOADING STALE] (0 0 0) Here client::info "connection" "6.2.0" "Describes the connection.";
            ClientList "client|list" -2 [ADMIN NOSCRIPT LOADING STALE] (0 0 0) Here client::list "connection" "2.4.0" "Describes the connections of this gateway.";
            ClientKill "client|kill" -3 [ADMIN NOSCRIPT LOADING STALE] (0 0 0) Here client::kill "connection" "2.4.0" "Closes connections of this gateway.";
            ClientSetname "client|setname" 3 [NOSCRIPT LOADING STALE] (0 0 0) Here client::setname "connection" "2.6.9" "Names the connection.";
            ClientGetname "client|getname" 2 [NOSCRIPT LOADING STALE] (0 0 0) Here client::getname "connection" "2.6.9" "Returns the connection's name.";
            ClientSetinfo "client|setinfo" 4 [NOSCRIPT LOADING STALE] (0 0 0) Here client::setinfo "connection" "7.2.0" "Notes the client library's name or version.";
            ClientNoEvict "client|no-evict" 3 [ADMIN NOSCRIPT LOADING STALE] (0 0 0) Here client::no_evict "connection" "7.0.0" "Accepted; connections are not evicted for memory.";
            ClientNoTouch "client|no-touch" 3 [NOSCRIPT LOADING STALE] (0 0 0) Here client::no_touch "connection" "7.2.0" "Accepted; access times are not kept.";
            ClientReply "client|reply" 3 [NOSCRIPT LOADING STALE] (0 0 0) Here client::reply "connection" "3.2.0" "Switches replies on, off, or skips one.";
            ClientPause "client|pause" -3 [ADMIN NOSCRIPT LOADING STALE] (0 0 0) Here client::pause "connection" "3.0.0" "Holds up the commands of all clients of this gateway.";
            ClientUnpause "client|unpause" 2 [ADMIN NOSCRIPT LOADING STALE] (0 0 0) Here client::unpause "connection" "6.2.0" "Ends a pause.";

            Command "command" -1 [CONTAINER LOADING STALE] (0 0 0) Here introspection::command "server" "2.8.13" "Describes all commands.";
            CommandHelp "command|help" 2 [LOADING STALE] (0 0 0) Here container::command_help "server" "5.0.0" "Lists the subcommands.";
            CommandCount "command|count" 2 [LOADING STALE] (0 0 0) Here introspection::count "server" "2.8.13" "Counts the commands.";
            CommandInfo "command|info" -2 [LOADING STALE] (0 0 0) Here introspection::info "server" "2.8.13" "Describes some or all commands.";
            CommandDocs "command|docs" -2 [LOADING STALE] (0 0 0) Here introspection::docs "server" "7.0.0" "Documents some or all commands.";
            CommandList "command|list" -2 [LOADING STALE] (0 0 0) Here introspection::list "server" "7.0.0" "Lists the names of commands.";
            CommandGetkeys "command|getkeys" -4 [LOADING STALE] (0 0 0) Here introspection::getkeys "server" "2.8.13" "Finds the keys in a command line.";
            CommandGetkeysandflags "command|getkeysandflags" -4 [LOADING STALE] (0 0 0) Here introspection::getkeysandflags "server" "7.0.0" "Finds the keys in a command line and how it uses them.";

            Config "config" -2 [CONTAINER] (0 0 0) Here container::missing "server" "2.0.0" "Commands on settings.";
            ConfigHelp "config|help" 2 [LOADING STALE] (0 0 0) Here container::config_help "server" "5.0.0" "Lists the subcommands.";
            ConfigGet "config|get" -3 [ADMIN NOSCRIPT LOADING STALE] (0 0 0) Here config::get "server" "2.0.0" "Returns settings by name or pattern.";
            ConfigSet "config|set" -4 [ADMIN NOSCRIPT LOADING STALE] (0 0 0) Here config::set "server" "2.0.0" "Changes settings.";
            ConfigResetstat "config|resetstat" 2 [ADMIN NOSCRIPT LOADING STALE] (0 0 0) Here config::resetstat "server" "2.0.0" "Sets the counters of INFO back to zero.";
            ConfigRewrite "config|rewrite" 2 [ADMIN NOSCRIPT LOADING STALE] (0 0 0) Here config::rewrite "server" "2.8.0" "Answers that there is no configuration file to rewrite.";

            Info "info" -1 [LOADING STALE] (0 0 0) Here info::info "server" "1.0.0" "Describes the server.";
            Role "role" 1 [NOSCRIPT LOADING STALE FAST] (0 0 0) Here replication::role "server" "2.8.12" "Returns how far the keyspace's copies are.";
            Time "time" 1 [LOADING STALE FAST] (0 0 0) Here server::time "server" "2.6.0" "Returns the time of this gateway.";
            Lolwut "lolwut" -1 [READONLY FAST] (0 0 0) Here server::lolwut "server" "5.0.0" "Shows the version and a picture.";
            Debug "debug" -2 [ADMIN NOSCRIPT LOADING STALE] (0 0 0) Here server::debug "server" "1.0.0" "Commands for tests: DEBUG SLEEP seconds holds up this connection.";
            Memory "memory" -2 [CONTAINER] (0 0 0) Here container::missing "server" "4.0.0" "Commands on memory.";
            MemoryHelp "memory|help" 2 [LOADING STALE] (0 0 0) Here container::memory_help "server" "4.0.0" "Lists the subcommands.";
            MemoryDoctor "memory|doctor" 2 [] (0 0 0) Here memory::doctor "server" "4.0.0" "Says whether memory needs attention.";
            MemoryMallocStats "memory|malloc-stats" 2 [] (0 0 0) Here memory::malloc_stats "server" "4.0.0" "Says what the allocator and the system know of this process's memory.";
            MemoryPurge "memory|purge" 2 [] (0 0 0) Here memory::purge "server" "4.0.0" "Accepted; the allocator gives memory back by itself.";
            MemoryStats "memory|stats" 2 [] (0 0 0) Here memory::stats "server" "4.0.0" "Shows what memory is used for, here and in the stores of the keyspace.";
            Slowlog "slowlog" -2 [CONTAINER] (0 0 0) Here container::missing "server" "2.2.12" "Commands on the log of slow commands.";
            SlowlogHelp "slowlog|help" 2 [LOADING STALE] (0 0 0) Here container::slowlog_help "server" "6.2.0" "Lists the subcommands.";
            SlowlogGet "slowlog|get" -2 [ADMIN LOADING STALE] (0 0 0) Here slowlog::get "server" "2.2.12" "Returns the slowest commands of this gateway.";
            SlowlogLen "slowlog|len" 2 [ADMIN LOADING STALE] (0 0 0) Here slowlog::len "server" "2.2.12" "Counts the entries.";
            SlowlogReset "slowlog|reset" 2 [ADMIN LOADING STALE] (0 0 0) Here slowlog::reset "server" "2.2.12" "Empties the log.";
            Bgsave "bgsave" -1 [ADMIN NOSCRIPT NO_ASYNC_LOADING] (0 0 0) Here backup::bgsave "server" "1.0.0" "Has every store make a backup and answers at once.";
            Save "save" 1 [ADMIN NOSCRIPT NO_ASYNC_LOADING NO_MULTI] (0 0 0) Here backup::save "server" "1.0.0" "Has every store make a backup and answers when all are done.";
            Lastsave "lastsave" 1 [LOADING STALE FAST] (0 0 0) Here backup::lastsave "server" "1.0.0" "Returns when the last backup was done that every store has, in Unix seconds; 0 = never.";
            Shutdown "shutdown" -1 [ADMIN NOSCRIPT LOADING STALE NO_MULTI ALLOW_BUSY] (0 0 0) Here server::shutdown "server" "1.0.0" "Stops the process that was asked.";
            Wait "wait" 3 [NOSCRIPT] (0 0 0) Here replication::wait "generic" "3.0.0" "Counts the replicas that have this connection's writes.";

            Multi "multi" 1 [NOSCRIPT LOADING STALE FAST ALLOW_BUSY] (0 0 0) Here transaction::multi "transactions" "1.2.0" "Starts a transaction.";
            Exec "exec" 1 [NOSCRIPT LOADING STALE SKIP_SLOWLOG] (0 0 0) Here transaction::exec "transactions" "1.2.0" "Runs the commands of a transaction; all keys must lie in one shard.";
            Discard "discard" 1 [NOSCRIPT LOADING STALE FAST ALLOW_BUSY] (0 0 0) Here transaction::discard "transactions" "2.0.0" "Drops a transaction.";
            Watch "watch" -2 [NOSCRIPT LOADING STALE FAST ALLOW_BUSY] (1 -1 1) Here transaction::watch "transactions" "2.2.0" "Makes the next EXEC depend on keys of one shard.";
            Unwatch "unwatch" 1 [NOSCRIPT LOADING STALE FAST ALLOW_BUSY] (0 0 0) Here transaction::unwatch "transactions" "2.2.0" "Forgets the watched keys.";

            Keyslot "keyslot" 2 [READONLY FAST] (0 0 0) Here topology::keyslot "vasto" "0.1.0" "Returns the slot of a key.";
            Topology "topology" 1 [LOADING STALE] (0 0 0) Here topology::topology "vasto" "0.1.0" "Shows which store serves which shard.";
            Stores "stores" 1 [LOADING STALE] (0 0 0) Here topology::stores "vasto" "0.1.0" "Lists the stores.";
            Keyspace "keyspace" -2 [CONTAINER] (0 0 0) Here container::missing "vasto" "0.1.0" "Commands on keyspaces.";
            KeyspaceHelp "keyspace|help" 2 [LOADING STALE] (0 0 0) Here container::keyspace_help "vasto" "0.1.0" "Lists the subcommands.";
            KeyspaceList "keyspace|list" 2 [LOADING STALE] (0 0 0) Here topology::keyspace_list "vasto" "0.1.0" "Lists the keyspaces.";
            KeyspaceAlter "keyspace|alter" -5 [ADMIN LOADING STALE] (0 0 0) Here keyspaces::keyspace_alter "vasto" "0.1.0" "Changes settings of a keyspace, for all gateways.";
            KeyspaceCreate "keyspace|create" -5 [ADMIN NOSCRIPT] (0 0 0) Here keyspaces::create "vasto" "0.1.0" "Creates a keyspace, for all gateways.";
            KeyspaceDrop "keyspace|drop" -3 [ADMIN NOSCRIPT] (0 0 0) Here keyspaces::drop "vasto" "0.1.0" "Drops a keyspace with all its data, for good.";
            KeyspaceFailover "keyspace|failover" -5 [ADMIN NOSCRIPT] (0 0 0) Here keyspaces::failover "vasto" "0.1.0" "Gives a shard another primary, without loss.";
            KeyspaceInfo "keyspace|info" 3 [LOADING STALE] (0 0 0) Here topology::keyspace_info "vasto" "0.1.0" "Describes a keyspace.";
            KeyspaceResize "keyspace|resize" -5 [ADMIN NOSCRIPT] (0 0 0) Here operations::resize "vasto" "0.1.0" "Begins to give a keyspace another number of shards while it serves; answers the number of the operation, or with WATCH its end.";
            KeyspaceReplace "keyspace|replace" -5 [ADMIN NOSCRIPT] (0 0 0) Here operations::replace "vasto" "0.1.0" "Begins to give the copies that a store has of a keyspace to others; answers the number of the operation, or with WATCH its end.";
            KeyspaceStatus "keyspace|status" 3 [NOSCRIPT LOADING STALE] (0 0 0) Here operations::status "vasto" "0.1.0" "Shows how far the operation of a keyspace is, or how the last one ended.";
            KeyspaceAbort "keyspace|abort" 3 [ADMIN NOSCRIPT] (0 0 0) Here operations::abort "vasto" "0.1.0" "Ends the operation of a keyspace as if it had not begun; refused when it is committed.";
            KeyspaceVerify "keyspace|verify" 3 [ADMIN NOSCRIPT] (0 0 0) Here verification::keyspace_verify "vasto" "0.1.0" "Compares the copies of a keyspace's shards; those that differ are made anew.";
            KeyspaceCompact "keyspace|compact" 3 [ADMIN NOSCRIPT] (0 0 0) Here compaction::keyspace_compact "vasto" "0.1.0" "Rewrites the files of a keyspace without its dead rows.";
        }
    };
}

macro_rules! specs {
    ($($variant:ident $name:literal $arity:literal [$($flag:ident)*] ($first:literal $last:literal $step:literal) $route:ident$(($merge:ident))?
        $module:ident::$function:ident $group:literal $since:literal $summary:literal;)*) => {
        &[$(CommandSpec {
            name: $name,
            arity: $arity,
            flags: Flags::NONE$(.union(Flags::$flag))*,
            keys: Keys { first: $first, last: $last, step: $step },
            route: Route::$route$((Merge::$merge))?,
            group: $group,
            since: $since,
            summary: $summary,
        }),*]
    };
}

macro_rules! store_command_enum {
    ($($variant:ident $name:literal $arity:literal [$($flag:ident)*] ($first:literal $last:literal $step:literal) $route:ident$(($merge:ident))?
        $module:ident::$function:ident $group:literal $since:literal $summary:literal;)*) => {
        /// A command that shards execute; its number is its code on the wire.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum StoreCommand { $(#[doc = $summary] $variant),* }

        impl StoreCommand {
            const ALL: &'static [StoreCommand] = &[$(Self::$variant),*];
        }
    };
}

macro_rules! gateway_command_enum {
    ($($variant:ident $name:literal $arity:literal [$($flag:ident)*] ($first:literal $last:literal $step:literal) $route:ident$(($merge:ident))?
        $module:ident::$function:ident $group:literal $since:literal $summary:literal;)*) => {
        /// A command that gateways execute.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum GatewayCommand { $(#[doc = $summary] $variant),* }

        impl GatewayCommand {
            const ALL: &'static [GatewayCommand] = &[$(Self::$variant),*];
        }
    };
}

store_commands!(store_command_enum);
gateway_commands!(gateway_command_enum);

/// Rows of the commands that shards execute, by [`StoreCommand`].
pub const STORE_ROWS: &[CommandSpec] = store_commands!(specs);
/// Rows of the commands that gateways execute, by [`GatewayCommand`].
pub const GATEWAY_ROWS: &[CommandSpec] = gateway_commands!(specs);

impl StoreCommand {
    /// `None` if no row has this code: a peer of another version sent it.
    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    pub fn code(self) -> u16 {
        self as u16
    }

    pub fn spec(self) -> &'static CommandSpec {
        &STORE_ROWS[self as usize]
    }
}

impl GatewayCommand {
    pub fn spec(self) -> &'static CommandSpec {
        &GATEWAY_ROWS[self as usize]
    }
}

/// Any row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    Store(StoreCommand),
    Gateway(GatewayCommand),
}

impl Command {
    pub fn spec(self) -> &'static CommandSpec {
        match self {
            Self::Store(command) => command.spec(),
            Self::Gateway(command) => command.spec(),
        }
    }

    /// Every row, internal ones included.
    pub fn all() -> impl Iterator<Item = Command> {
        let store = StoreCommand::ALL.iter().map(|command| Self::Store(*command));
        store.chain(GatewayCommand::ALL.iter().map(|command| Self::Gateway(*command)))
    }

    /// The rows of a container's subcommands.
    pub fn subcommands(container: &str) -> impl Iterator<Item = Command> + '_ {
        Self::all().filter(move |command| {
            command.spec().name.strip_prefix(container).is_some_and(|rest| rest.starts_with('|'))
        })
    }
}

/// Longest name of a row, the longest subcommand included.
const NAME_BYTES_MAX: usize = 32;
/// Places of the look-up table: a power of two, four times the rows, so that most look-ups need one comparison.
const LOOKUP_PLACES: usize = 1024;

struct Lookup {
    places: Vec<Option<Command>>,
}

impl Lookup {
    fn new() -> Self {
        let mut places = vec![None; LOOKUP_PLACES];
        for command in Command::all() {
            let name = command.spec().name;
            assert!(name.len() <= NAME_BYTES_MAX, "name {name} is longer than NAME_BYTES_MAX");
            let mut place = Self::place(name.as_bytes());
            while places[place].is_some() {
                place = (place + 1) % LOOKUP_PLACES;
            }
            places[place] = Some(command);
        }
        Self { places }
    }

    /// FNV-1a of the lower-case name.
    fn place(lower: &[u8]) -> usize {
        let hash = lower.iter().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
        (hash ^ (hash >> 15)) as usize % LOOKUP_PLACES
    }

    fn find(&self, lower: &[u8]) -> Option<Command> {
        let mut place = Self::place(lower);
        while let Some(command) = self.places[place] {
            if command.spec().name.as_bytes() == lower {
                return Some(command);
            }
            place = (place + 1) % LOOKUP_PLACES;
        }
        None
    }
}

fn lookup() -> &'static Lookup {
    static LOOKUP: OnceLock<Lookup> = OnceLock::new();
    LOOKUP.get_or_init(Lookup::new)
}

/// The row of a name in any case; a subcommand as `container|sub`. Finds internal rows too: the caller must refuse them to clients.
pub fn find(name: &[u8]) -> Option<Command> {
    let mut lower = [0u8; NAME_BYTES_MAX];
    let lower = lower.get_mut(..name.len())?;
    lower.copy_from_slice(name);
    lower.make_ascii_lowercase();
    lookup().find(lower)
}

/// The row of a container's subcommand, both in any case.
pub fn find_subcommand(container: &CommandSpec, sub: &[u8]) -> Option<Command> {
    let mut lower = [0u8; NAME_BYTES_MAX];
    let container = container.name.as_bytes();
    let whole = lower.get_mut(..container.len() + 1 + sub.len())?;
    whole[..container.len()].copy_from_slice(container);
    whole[container.len()] = b'|';
    whole[container.len() + 1..].copy_from_slice(sub);
    whole.make_ascii_lowercase();
    lookup().find(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_found_by_its_name_in_any_case() {
        for command in Command::all() {
            let name = command.spec().name;
            assert_eq!(find(name.to_uppercase().as_bytes()), Some(command), "{name}");
            if let Some((container, sub)) = name.split_once('|') {
                let container = find(container.as_bytes()).expect("a subcommand has a container").spec();
                assert!(container.flags.contains(Flags::CONTAINER), "{name}");
                assert_eq!(find_subcommand(container, sub.to_uppercase().as_bytes()), Some(command), "{name}");
            }
        }
        assert_eq!(find(b"nosuch"), None);
        assert_eq!(find(&[b'x'; 100]), None);
    }

    #[test]
    fn rows_are_consistent() {
        for command in Command::all() {
            let spec = command.spec();
            assert_eq!(spec.name, spec.name.to_lowercase());
            assert_eq!(spec.name.starts_with('_'), spec.flags.contains(Flags::INTERNAL), "{}", spec.name);
            let here = spec.route == Route::Here;
            assert_eq!(here, matches!(command, Command::Gateway(_)), "{}", spec.name);
            if let Route::Split(_) = spec.route {
                assert!(spec.keys.last == -1, "{}: only a list of keys to the end can be split", spec.name);
            }
            if spec.route == Route::OneShard && !spec.flags.contains(Flags::INTERNAL) {
                assert!(spec.keys.first > 0, "{}: which shard?", spec.name);
            }
        }
    }

    #[test]
    fn key_positions_are_those_of_redis() {
        let positions =
            |name: &str, count| find(name.as_bytes()).unwrap().spec().key_positions(count).collect::<Vec<_>>();
        assert_eq!(positions("get", 2), [1]);
        assert_eq!(positions("mset", 5), [1, 3]);
        assert_eq!(positions("del", 4), [1, 2, 3]);
        assert_eq!(positions("rename", 3), [1, 2]);
        assert_eq!(positions("object|encoding", 3), [2]);
        assert_eq!(positions("ping", 1), [0usize; 0]);
    }
}
