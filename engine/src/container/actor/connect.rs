//! A container's networks: taken at each start, and changed while it runs.

use coracle_agent_api::{ErrorKind, Network};

use super::Actor;
use crate::{
    error::{Result, chain},
    networks::{endpoint::Wanted, names_of},
};

impl Actor {
    /// Takes the places that it is to have on its networks. They are in its record before the guest hears of them.
    pub(super) async fn join_networks(&mut self) -> Result<Network> {
        let (network, joined) = self.core.join_networks(&mut self.record)?;
        let published = self.core.publish_ports(&mut self.record)?;
        if joined || published {
            self.save().await?;
        }
        Ok(network)
    }

    /// Puts it on a further network.
    pub(super) async fn connect(&mut self, name: &str, wanted: Wanted) -> Result<()> {
        let network = self.core.networks.find(name)?;
        let endpoint = self.core.add_network(&mut self.record, &network, wanted)?;
        let mut result = self.save().await;
        if let (Ok(()), Some(endpoint)) = (&result, &endpoint) {
            result = match self.host().agent().connect(&self.record.id, endpoint).await {
                Err(error) if error.refusal().is_none() => {
                    // It may be connected all the same. Its address must not be another one's before it is not.
                    let undone = self.host().agent().disconnect(&self.record.id, &network.id).await;
                    if undone.is_err_and(|error| error.refusal() != Some(ErrorKind::Conflict)) {
                        // Its end will be told, so its beginning is.
                        self.core.events.network("connect", &network, Some(&self.record.id));
                        return Err(error.into());
                    }
                    Err(error.into())
                }
                other => other.map_err(Into::into),
            };
        }
        if let Err(error) = result {
            self.forget_network(&network.name).await;
            return Err(error);
        }
        if endpoint.is_some() {
            self.lead_out().await;
            self.core.events.network("connect", &network, Some(&self.record.id));
        }
        Ok(())
    }

    /// Its way out is that of the networks that it is on now.
    async fn lead_out(&self) {
        let ways = self.core.ways_out(&self.record);
        if let Err(error) = self.host().agent().lead_out(&self.record.id, &ways).await
            && error.refusal() != Some(ErrorKind::Conflict)
        {
            tracing::warn!(
                error = chain(&error),
                "a container may have no way out after a change of its networks"
            );
        }
    }

    async fn forget_network(&mut self, name: &str) {
        if let Some(attached) = self.record.networks.remove(name) {
            self.core.leave_network(&self.record, &attached);
        }
        if let Err(error) = self.save().await {
            tracing::error!(%error, "cannot write down that a container is not on a network");
        }
    }

    /// Its new name is known on its networks.
    pub(super) async fn rename_on_networks(&self) {
        if !self.record.state.status.is_running() {
            return;
        }
        for attached in self.record.networks.values() {
            let network =
                self.core.networks.find(&attached.network).ok().filter(|network| network.is_user_defined());
            let Some(network) = network else { continue };
            let names = names_of(&self.record, &attached.wanted);
            if let Err(error) = self.host().agent().rename_on(&self.record.id, &network.id, &names).await
                // One that has ended is on no network; that is told soon.
                && error.refusal() != Some(ErrorKind::Conflict)
            {
                tracing::warn!(error = chain(&error), "a container's new name is not known on a network");
            }
        }
    }

    /// Takes it off a network.
    pub(super) async fn disconnect(&mut self, name: &str) -> Result<()> {
        let (name, attached) = self.core.drop_network(&mut self.record, name)?;
        let id = attached.network.parse().ok().filter(|_| self.record.state.status.is_running());
        if let Some(id) = &id {
            match self.host().agent().disconnect(&self.record.id, id).await {
                // It has ended; that is told soon.
                Err(error) if error.refusal() == Some(ErrorKind::Conflict) => {
                    tracing::debug!(error = chain(&error), "a container that has ended is on no network");
                }
                Err(error) => {
                    self.record.networks.insert(name, attached);
                    return Err(error.into());
                }
                Ok(()) => {}
            }
        }
        // The guest has let go of the address, so what is written down next is true already.
        let saved = self.save().await;
        self.core.leave_network(&self.record, &attached);
        if id.is_some() {
            self.lead_out().await;
        }
        if id.is_some()
            && let Ok(network) = self.core.networks.find(&attached.network)
        {
            self.core.events.network("disconnect", &network, Some(&self.record.id));
        }
        saved
    }
}
