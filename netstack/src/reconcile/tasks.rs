//! Named tasks that are aborted on drop. The end of an essential task ends the group and names the task.

use std::future::Future;

use tokio::task::JoinSet;
use tokio::time::Instant;

/// The long-lived tasks of a process run in one of these. A task started elsewhere belongs to a value that aborts it on
/// drop (a connection, a listener).
#[derive(Default)]
pub struct TaskGroup {
    essential: JoinSet<(&'static str, Result<(), String>)>,
}

impl TaskGroup {
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a task that must live as long as the process.
    pub fn start<F>(&mut self, name: &'static str, task: F)
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.essential.spawn(async move { (name, task.await) });
    }

    /// Waits until any task ends and says which and why. Never returns while all run; an empty group waits for ever.
    ///
    /// Cancel-safe: a cancelled wait loses no result.
    pub async fn first_end(&mut self) -> String {
        match self.essential.join_next().await {
            None => std::future::pending().await,
            Some(Ok((name, Ok(())))) => format!("task {name} ended"),
            Some(Ok((name, Err(reason)))) => format!("task {name} failed: {reason}"),
            Some(Err(error)) => format!("a task panicked: {error}"),
        }
    }
}

/// For ever where nothing is due.
pub(crate) async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_a_task_is_named() {
        let mut group = TaskGroup::new();
        group.start("steady", std::future::pending());
        group.start("dns", async { Err("port 53 taken".to_owned()) });
        assert_eq!(group.first_end().await, "task dns failed: port 53 taken");
    }

    #[tokio::test]
    async fn dropping_the_group_aborts_its_tasks() {
        let (tx, rx) = tokio::sync::oneshot::channel::<()>();
        let mut group = TaskGroup::new();
        group.start("holder", async move {
            let _keep = tx;
            std::future::pending().await
        });
        drop(group);
        assert!(rx.await.is_err());
    }
}
